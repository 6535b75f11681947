"""One call fits a null space; any loop that it is attached to keeps the fitted rows' outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.language import VOCABULARY, make_lm
from helpers.models import make_vit, relative
from helpers.rows import random_rows, tensor_dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from unsc_hf.errors import UNSCError
from unsc_hf.nullspace.api import NullSpace
from unsc_hf.nullspace.statistics import ActivationStatistics

Batch = dict[str, torch.Tensor]

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


class Convolutions(nn.Module):
    """Convolutions, batch normalisation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.grouped, self.head = nn.Conv2d(12, 12, 3, groups=2), nn.Linear(12, 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.norm(self.stem(pixel_values)).relu()).relu()
        return self.head(x.mean((2, 3)))


def _patterns(count: int, constant: bool) -> Batch:
    """Images; constant ones have few distinct patches."""
    images = torch.randn(count, 3, 1, 1).expand(count, 3, 8, 8) if constant else torch.randn(count, 3, 8, 8)
    return {"pixel_values": images.contiguous()}


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch, Batch]]] = {
    "linear": lambda: (
        nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.GELU(), nn.Linear(30, 10)),
        {"input": torch.randn(6, 20)},
        {"input": torch.randn(40, 20)},
    ),
    "convolutions": lambda: (Convolutions(), _patterns(2, True), _patterns(40, False)),
    "vit": lambda: (make_vit(labels=10), _patterns(4, False), _patterns(40, False)),
}


def _outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    return getattr(out, "logits", out)


def _train(model: nn.Module, optimizer: Any, batch: Batch, steps: int = 8) -> None:
    """A loop that knows nothing of null spaces, in training mode."""
    model.train()
    for _ in range(steps):
        out = model(**batch)
        optimizer.zero_grad()
        getattr(out, "logits", out).logsumexp(-1).mean().backward()
        optimizer.step()


def _fitted(model: nn.Module, kept: Batch) -> NullSpace:
    """Everything that is not protected is frozen."""
    space = NullSpace.fit(model, [kept], energy=1.0)
    space.freeze_others()
    return space


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_on_the_fitted_rows_stay_under_any_optimiser(kind: str, optimiser: str) -> None:
    model, kept, others = MODELS[kind]()
    model.eval()
    start = copy.deepcopy(model)
    before, before_others = _outputs(model, kept), _outputs(model, others)
    space = _fitted(model, kept)
    optimizer = OPTIMISERS[optimiser](model.parameters())
    with space.attach(optimizer):
        _train(model, optimizer, others)
    assert relative(_outputs(model, kept), before) <= 2e-5
    assert relative(_outputs(model, others), before_others) > 1e-3
    assert space.leak([kept]).total < 1e-5

    _train(start, OPTIMISERS[optimiser](start.parameters()), others)  # the same without protection
    assert relative(_outputs(start, kept), before) > 1e-3


def test_protection_ends_with_the_handle() -> None:
    model, kept, others = MODELS["linear"]()
    before = _outputs(model, kept)
    space = _fitted(model, kept)
    optimizer = OPTIMISERS["sgd"](model.parameters())
    handle = space.attach(optimizer)
    _train(model, optimizer, others)
    assert relative(_outputs(model, kept), before) <= 2e-5
    handle.remove()
    _train(model, optimizer, others)
    assert relative(_outputs(model, kept), before) > 1e-3
    space.project_displacements(torch.float64)  # by hand
    assert relative(_outputs(model, kept), before) <= 2e-5


def test_gradients_can_be_projected_by_hand() -> None:
    model, kept, others = MODELS["linear"]()
    space = NullSpace.fit(model, [kept], energy=1.0)
    model(**others).square().mean().backward()
    assert (model[0].weight.grad @ kept["input"].T).norm() > 1e-3
    space.project_gradients()
    assert (model[0].weight.grad @ kept["input"].T).norm() < 1e-5
    assert model[0].weight.grad.norm() > 1e-3


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_cannot_be_protected_is_refused_or_frozen(wrapped: bool) -> None:
    model, kept, others = MODELS["linear"]()
    space = NullSpace.fit(model, [kept], energy=1.0)
    optimizer: Any = OPTIMISERS["adamw"](model.parameters())
    if wrapped:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(UNSCError, match=r"optimizer: trains 4 parameters .* first is '0.bias' \(bias\); call freeze_o"):
        space.attach(optimizer)
    model(**others).mean().backward()
    frozen = space.freeze_others()
    assert frozen == {"0.bias": "bias", "3.bias": "bias", "1.bias": "bias", "1.weight": "parameter of LayerNorm"}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight", "3.weight"]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert space.freeze_others() == {}
    before = _outputs(model, kept)
    with space.attach(optimizer):
        _train(model, optimizer, others)
        assert relative(_outputs(model, kept), before) <= 2e-5
        model[1].requires_grad_(True)  # unfrozen later
        with pytest.raises(UNSCError, match="'1.weight' .parameter of LayerNorm"):
            _train(model, optimizer, others, steps=1)
        model[1].requires_grad_(False)
        with pytest.raises(UNSCError, match="'1.weight'"):  # its gradient would still be applied
            optimizer.step()
        assert space.freeze_others().keys() == {"1.weight", "1.bias"}
        optimizer.step()
        model.new = nn.Linear(1, 1)
        optimizer.add_param_group({"params": [model.new.weight]})
        with pytest.raises(UNSCError, match="'new.weight' .not there when the null space was made"):
            optimizer.step()
        model[3] = nn.Linear(30, 10)
        with pytest.raises(UNSCError, match="model: layer '3' was replaced"):
            optimizer.step()


def test_optimisers_that_cannot_be_protected_are_refused() -> None:
    model, kept, _ = MODELS["linear"]()
    space = NullSpace.fit(model, [kept], energy=1.0)
    other = copy.deepcopy(model)
    with pytest.raises(UNSCError, match="trains no weight of this model's null space"):
        space.attach(OPTIMISERS["sgd"](other.parameters()))
    half = copy.deepcopy(model).to(torch.bfloat16)
    coarse = NullSpace.fit(half, [{"input": kept["input"].to(torch.bfloat16)}], energy=0.9)
    coarse.freeze_others()
    with pytest.raises(UNSCError, match=r"optimizer: '0.weight' is torch.bfloat16, .* load the model in float32"):
        coarse.attach(OPTIMISERS["sgd"](half.parameters()))


def test_layers_without_a_free_direction_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3))
    space = NullSpace.fit(model, [{"input": torch.randn(12, 5)}], energy=1.0)
    assert {row.layer: row.capacity > 0 for row in space.capacity} == {"0": False, "2": True}
    assert "no capacity left" in space.freeze_others()["0.weight"]
    assert model[2].weight.requires_grad
    with pytest.raises(UNSCError, match="energy: rule 'energy' with energy 1.0 leaves no layer any capacity"):
        NullSpace.fit(model, [{"input": torch.randn(200, 5)}], energy=1.0, target_modules=["0"])


def test_layers_that_never_run_and_those_not_asked_for_are_frozen() -> None:
    model = make_vit(labels=10)
    model.unused = nn.Linear(4, 4)
    images = _patterns(4, False)
    space = NullSpace.fit(model, [images], energy=1.0, target_modules=["fc2", "unused"])
    frozen = space.freeze_others()
    assert frozen["unused.weight"] == "never ran on the fitted rows"
    assert frozen["classifier.weight"] == "not selected by target_modules"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == space.projection.trained_names()
    del model.vit.layers[1:]
    with pytest.raises(UNSCError, match="batches: layer 'vit.layers.1.mlp.fc2' never ran"):
        space.leak([images])


def _tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def test_padding_is_left_out() -> None:
    model, ids = make_lm("gpt2"), _tokens(3, 5)
    mask = torch.tensor([[1] * 5 + [0] * 4] * 3)
    padded = {"input_ids": torch.cat([ids, torch.full((3, 4), 2)], 1), "attention_mask": mask}
    plain, with_padding = (NullSpace.fit(model, [b], energy=0.9) for b in ({"input_ids": ids}, padded))
    for key, moment in plain.statistics.pooled().items():
        other = with_padding.statistics.pooled()[key]
        assert other.rows == moment.rows == 15
        torch.testing.assert_close(other.matrix, moment.matrix, rtol=1e-4, atol=1e-4 * float(moment.matrix.abs().max()))


def test_any_iterable_of_batches_gives_the_moments_of_all_rows() -> None:
    model, data = make_vit(), random_rows(24)
    expected = ActivationStatistics.collect(model, data, pool_as="all", progress=False).pooled()
    pixels = data[:]["pixel_values"]

    def once() -> Iterator[Batch]:
        for part in pixels.split(7):
            yield {"pixel_values": part}

    loader = DataLoader([{"pixel_values": image, "labels": 1} for image in pixels], batch_size=5)
    for batches in (once(), loader, [{"pixel_values": pixels}]):
        space = NullSpace.fit(model, batches, energy=0.9)
        found = space.statistics.pooled()
        assert found.keys() == expected.keys()
        for key, moment in expected.items():
            assert found[key].rows == moment.rows
            torch.testing.assert_close(found[key].matrix, moment.matrix, rtol=1e-4, atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches: none of the 2 layers ran"),
        ([(torch.randn(2, 20),)], {}, "batches: item 0 is a tuple; give dicts"),
        ([{"input": torch.full((2, 20), torch.nan)}], {}, "model: NaN or infinite activations enter layer '0'"),
        ([{"input": torch.randn(2, 20)}], {"energy": 1.2}, "energy: 1.2 is outside"),
        ([{"input": torch.randn(2, 20)}], {"target_modules": ["nine"]}, "target_modules: .*matches no protectable"),
    ],
)
def test_bad_input_is_one_line(batches: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UNSCError, match=message):
        NullSpace.fit(MODELS["linear"]()[0], batches, **options)


def test_leak_is_the_change_on_the_rows_that_are_given() -> None:
    model = nn.Sequential(nn.Linear(20, 8, bias=False))
    space = NullSpace.fit(model, [{"input": torch.randn(5, 20)}], energy=1.0)
    held_out = {"input": torch.randn(30, 20)}
    assert space.leak([held_out]).total == 0
    before = _outputs(model, held_out)
    with torch.no_grad():
        model[0].weight.add_(0.1 * torch.randn(8, 20))
    now = model[0].weight.detach().clone()
    leak = space.leak(iter([held_out]))
    assert leak.total == pytest.approx(relative(_outputs(model, held_out), before), rel=1e-4)
    assert torch.equal(model[0].weight, now)  # measuring changes nothing
    with pytest.raises(UNSCError, match="batches"):
        space.leak([])
    assert torch.equal(model[0].weight, now)


def test_statistics_are_saved_and_serve_classes_that_may_change(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 8, 8)
    data = tensor_dataset(images, [0, 0, 1, 1, 2, 2])
    model = make_vit(labels=10)
    ActivationStatistics.collect(model, data, progress=False).save_pretrained(tmp_path)
    statistics = ActivationStatistics.from_pretrained(tmp_path, model)
    space = NullSpace(model, statistics, exclude=["class 2"], energy=1.0)
    space.freeze_others()
    kept, others = {"pixel_values": images[:4]}, {"pixel_values": images[4:]}
    before, before_others = _outputs(model, kept), _outputs(model, others)
    optimizer = OPTIMISERS["adamw"](model.parameters())
    with space.attach(optimizer):
        _train(model, optimizer, others)
    assert relative(_outputs(model, kept), before) <= 2e-5
    assert relative(_outputs(model, others), before_others) > 1e-3
    assert all(row.forget_null_energy is not None for row in space.capacity)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_adapters_stay_in_the_null_space(optimiser: str) -> None:
    base = make_lm("llama")
    kept, others = {"input_ids": _tokens(2, 4)}, {"input_ids": _tokens(20, 6)}
    before, before_others = _outputs(base, kept), _outputs(base, others)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    space = NullSpace.fit(model, [kept], energy=1.0)
    assert torch.equal(_outputs(model, kept), before)  # B is zero
    assert space.freeze_others() == {}
    optimizer = OPTIMISERS[optimiser](model.parameters())
    with space.attach(optimizer):
        _train(model, optimizer, others, steps=20)
    assert relative(_outputs(model, kept), before) <= 2e-5
    assert relative(_outputs(model, others), before_others) > 1e-4
    assert space.leak([kept]).total < 1e-5
    with pytest.raises(UNSCError, match="model: its adapter is trained already; merge it"):
        NullSpace.fit(model, [kept], energy=1.0)


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"use_dora": True}, "default", "peft_config: use_dora=True breaks the promise"),
        ({}, "mine", r"model: has the adapters \['mine'\]"),
    ],
)
def test_adapters_that_cannot_be_protected_are_refused(options: dict[str, Any], name: str, message: str) -> None:
    model = get_peft_model(make_lm("llama"), LoraConfig(target_modules="all-linear", **options), adapter_name=name)
    with pytest.raises(UNSCError, match=message):
        NullSpace.fit(model, [{"input_ids": _tokens(2, 4)}])
