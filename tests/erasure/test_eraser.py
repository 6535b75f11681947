"""Erasure in whole models: what is read moves, the rest stays, the budget holds, and adapters stay ordinary ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.architectures import NAMES, build, rows_for
from helpers.language import make_lm
from helpers.models import learned, logits, make_vit, relative
from helpers.rows import Data, Draw, tensor_dataset
from helpers.training import make_trainer, network_of, unlearned
from peft import LoraConfig, PeftModel

from unsc_hf import UNSCConfig, UNSCError, UNSCTrainer, split_dataset
from unsc_hf.erasure.closed_form import Folds, LowRank, folding_sites
from unsc_hf.erasure.eraser import Attempt, Erased, erase_features
from unsc_hf.erasure.readings import (
    ErasureRows,
    Reading,
    erasure_rows,
    find_readings,
    find_writer,
    jacobian,
    read_writer,
)
from unsc_hf.models.adapters import add_adapters
from unsc_hf.models.layers import find_layers
from unsc_hf.models.outputs import head_weights


def batch_of(rows: Dataset) -> dict[str, Any]:
    batch = dict(rows[:])
    return {("labels" if name == "label" else name): torch.as_tensor(value) for name, value in batch.items()}


def _trainer(model: Any, folder: Path, data: Data | None = None, choose: Any = None, **options: Any) -> UNSCTrainer:
    """A trainer that takes a few small steps, and then erases features."""
    settings = {"feature_erasure": "layers", "max_steps": 3, "learning_rate": 1e-4, "target_forget_accuracy": 0.999}
    data = data or rows_for(model, model.config.model_type)
    trainer = make_trainer(model, data, folder, check_steps=100, **{**settings, "pseudo_labels": "top1", **options})
    trainer.choose_erasure = choose
    return trainer


def _erased(model: Any, folder: Path, data: Data | None = None, choose: Any = None, **options: Any) -> UNSCTrainer:
    trainer = _trainer(model, folder, data, choose, **options)
    trainer.train()
    return trainer


def _rows(trainer: UNSCTrainer) -> ErasureRows:
    return erasure_rows(trainer.feature_rows(), trainer.prepare_unlearning().pseudo_labels)


def _leak(trainer: UNSCTrainer) -> float:
    return trainer.held_out_leak().total


def _erase(trainer: UNSCTrainer, leak: Callable[[], float], known: Callable[[], float]) -> list[Erased]:
    """Erase the features of what a trainer has unlearned, with other measures of its leak and of what is known."""
    trainer.args.feature_erasure, plan = "layers", trainer.prepare_unlearning()
    rows, layers = trainer.feature_rows(), plan.selection.layers
    return erase_features(trainer.model, layers, rows, plan.pseudo_labels, leak, known, trainer.goal.target)


def _left(trainer: UNSCTrainer) -> dict[str, float]:
    """Norms of the differences of class means as the model has them now, by reading."""
    rows, network, left = _rows(trainer), network_of(trainer), {}
    for reading in find_readings(network, True, False, rows.retained[0]):
        parts = ([reading.rows(network, batch) for batch in part] for part in (rows.forgotten, rows.retained))
        left[reading.name] = float(rows.differences(*(torch.cat(part).detach() for part in parts)).norm())
    return left


WRITERS = {
    "vit": ("vit.layers.1.mlp.fc2", {"layer_01": "vit.layers.0.mlp.fc2", "layer_02": "vit.layers.1.mlp.fc2"}),
    "bert": ("bert.pooler.dense", {"layer_01": "bert.encoder.layer.0.output.dense"}),
    "distilbert": ("pre_classifier", {}),
    **dict.fromkeys(("resnet", "dinov2", "convnext", "swin"), (None, {})),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_writers_and_the_derivative_of_the_tail(name: str) -> None:
    model = build(name)
    batch = batch_of(rows_for(model, name)[0].select(range(4)))
    layers = find_layers(model).layers
    wanted, others = WRITERS[name]
    by_name = {}
    for reading in find_readings(model, True, False, batch):
        writer = find_writer(model, layers, reading, batch)
        by_name[reading.name] = writer and writer.name
        if writer is None:
            continue
        # A small constant added to the writer's output moves the mean feature as the derivative says.
        features, inputs = read_writer(model, writer, reading, [batch])
        assert inputs.shape == (4, writer.geometry.width)
        slope = jacobian(model, writer, reading, batch)
        step = 1e-3 * torch.randn(slope.shape[1])
        shape = (-1, 1, 1) if writer.geometry.kind == "conv2d" else (-1,)
        handle = writer.module.register_forward_hook(lambda m, a, z, s=step, v=shape: z + s.reshape(v))
        with torch.no_grad():
            moved = reading.rows(model, batch).mean(0) - features.mean(0)
        handle.remove()
        expected = (slope @ step.double()).float()
        assert float((moved - expected).norm()) < 0.15 * float(expected.norm()) + 1e-5, reading.name
    assert by_name["head"] is not None
    if wanted:
        assert by_name["head"] == wanted
    assert {key: by_name[key] for key in others} == others


@pytest.mark.parametrize("name", ["vit", "bert", "resnet"])
@pytest.mark.parametrize("place", ["head", "layers"])
def test_differences_of_class_means_shrink(name: str, place: str, tmp_path: Path) -> None:
    trainer = _erased(build(name), tmp_path, feature_erasure=place, erasure_strength=0.9)
    assert {one.reading for one in trainer.erased} >= ({"head"} if place == "head" else {"head", "layer_01"})
    # A ReLU behind the writer of a random ResNet is in the way: three quarters of its differences go in the mean, a
    # half in the worst of ninety draws, and a third has been seen.
    most = 0.9 if name == "resnet" else 0.5
    for one in trainer.erased:
        assert 0 < one.before < math.inf
        assert one.after < most * one.before, one
    leak = trainer.certify().leak
    assert leak > 1e-5  # declared: this left the null space
    assert [entry["leak"] for entry in trainer.state.log_history if "leak" in entry][-1] == pytest.approx(leak)
    with pytest.raises(UNSCError, match="feature_erasure: features are erased already"):
        trainer.train()


def test_strength_zero_leaves_what_the_head_reads(tmp_path: Path) -> None:
    trainer = _erased(build("vit"), tmp_path, feature_erasure="head", erasure_strength=0.0)
    (one,) = trainer.erased
    assert 0 < one.after < one.before


def test_the_budget_bounds_what_is_erased(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = _erased(build("vit"), tmp_path, max_leak=1e-3, erasure_strength=1.0, pseudo_labels="soft")
    assert trainer.certify().leak <= 1e-3
    assert "Erasure was scaled to" in caplog.text
    assert all(one.strength < 0.5 for one in trainer.erased)
    # What is said to be left is left, of changes that were scaled down.
    for one in trainer.erased:
        assert one.after == pytest.approx(_left(trainer)[one.reading], rel=1e-3)


@pytest.mark.parametrize("budget", ["for some", "for less than the head"])
def test_chosen_strengths_give_the_head_its_share_of_the_budget_first(
    budget: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = build("vit")
    data = rows_for(start, "vit")

    def choose(reading: Reading, _attempt: Attempt) -> float:
        return 0.9 if reading.state is None else 0.8

    def run(place: str, max_leak: float | None) -> Any:
        trainer = _erased(copy.deepcopy(start), tmp_path, data, choose, max_leak=max_leak, feature_erasure=place)
        return trainer, {one.reading: one for one in trainer.erased}, trainer.held_out_leak().total

    _, every, of_all = run("layers", None)
    _, _, of_head = run("head", None)
    # Where hidden states helped a random model with the head's input, all of it leaks no more than the head alone.
    limit = min((of_head + of_all) / 2, 0.9 * of_all) if budget == "for some" else 0.3 * min(of_head, of_all)
    trainer, erased, leak = run("layers", limit)
    assert 0.5 * limit < leak <= limit
    hidden = [one for name, one in erased.items() if name != "head"]
    shares = [one.strength / 0.8 for one in hidden]
    assert shares == pytest.approx([shares[0]] * len(shares))
    assert caplog.text.count("% at the head's input: all of it exceeds the leak budget") == 1
    if budget == "for some":
        # The head's input is served whole, or nearly where a random model's hidden states had helped with it.
        served = erased["head"].strength / 0.9
        assert served > 0.6
        assert 0 <= shares[0] < served
        # The same target, from another start.
        assert erased["head"].after < every["head"].after + (1.2 - served) * erased["head"].before
    else:
        assert 0 < erased["head"].strength < 0.9
        assert shares[0] == 0
    # What is said to be left is left.
    for name, left in _left(trainer).items():
        assert erased[name].after == pytest.approx(left, rel=1e-3)


def test_a_small_class_is_read_beside_a_large_one_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("vit")
    _, retain = rows_for(model, "vit")
    side = retain[0]["pixel_values"].shape[-1]

    def rows(small: int) -> Any:
        labels = [2] * 700 + [3] * small
        forget = tensor_dataset(torch.randn(len(labels), 3, side, side), labels, NAMES)
        return _rows(_trainer(model, tmp_path, (forget, retain)))

    read = rows(20)
    assert int((read.own == 3).sum()) > 10  # all that are not held out, not a share of the 720
    assert 3 in {own for own, _ in read.pairs}
    caplog.clear()
    rows(2)  # one is held out, and one has no mean
    assert "Class 3 is not erased" in caplog.text


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "lora_alpha": 16}])
def test_adapters_grow_and_load_as_any_other(lora: dict[str, Any], tmp_path: Path) -> None:
    model = build("vit")
    fresh, data = copy.deepcopy(model), rows_for(model, "vit")
    trainer = _erased(
        model, tmp_path, data, max_steps=5, learning_rate=1e-2, pseudo_labels="soft",
        peft_config=LoraConfig(r=4, **lora),
    )  # fmt: skip
    forget, network = data[0], network_of(trainer)
    assert network.peft_config["default"].rank_pattern
    assert trainer.certify().leak > 1e-5
    trainer.save_model()
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded, forget), logits(network, forget))
    assert relative(logits(loaded.merge_and_unload(), forget), logits(network, forget)) < 1e-4


@pytest.mark.parametrize("kind", ["full", "lora", "conv lora"])
def test_folds_are_exact_and_can_be_taken_back(kind: str) -> None:
    model: Any = make_vit()
    if kind != "full":
        target = ["projection"] if kind == "conv lora" else ["fc2"]
        model = add_adapters(model, LoraConfig(r=3, target_modules=target))
    sites = folding_sites(model, find_layers(model).layers)
    site = next(s for s in sites if s.name.endswith("projection" if kind == "conv lora" else "fc2"))
    pixels = torch.randn(2, 3, 8, 8)
    seen: list[torch.Tensor] = []
    site.module.register_forward_hook(lambda m, a, z: seen.append(z.detach()))

    def run() -> torch.Tensor:
        with torch.no_grad():
            model(pixel_values=pixels)
        return seen[-1]

    base = getattr(site.module, "base_layer", site.module)
    out, width = base.weight.shape[0], site.geometry.width
    inputs: list[torch.Tensor] = []
    base.register_forward_pre_hook(lambda m, a: inputs.append(a[0].detach()))
    before, folds = run(), Folds(model)
    change = LowRank(torch.randn(out, 2).double(), torch.randn(width, 2).double())
    expected = (site.rows(inputs[-1])[0] @ change.dense().float().T).reshape(2, -1, out)
    expected = expected.transpose(1, 2).reshape(before.shape) if kind == "conv lora" else expected.reshape(before.shape)
    folds.fold(site, change)
    assert torch.allclose(run() - before, expected, atol=1e-4)
    folds.fold(site, change)
    folds.unfold(site)
    folds.scale(0.5)
    assert torch.allclose(run() - before, expected / 2, atol=1e-4)
    folds.fold(site, change)  # later ones are whole
    assert torch.allclose(run() - before, 1.5 * expected, atol=1e-4)
    folds.unfold(site)
    folds.unfold(site)
    assert torch.allclose(run(), before, atol=1e-6)
    folds.fold(site, change)
    folds.scale(0.5)
    folds.settle()
    folds.fold(site, change)
    folds.scale(0.5)
    assert torch.allclose(run() - before, 0.75 * expected, atol=1e-4)
    folds.clear()
    assert torch.allclose(run(), before, atol=1e-6)


def test_language_models(token_data: Data, tmp_path: Path) -> None:
    trainer = _erased(make_lm(), tmp_path, token_data, learning_rate=1e-2, erasure_strength=0.8)
    assert all(one.after < 0.5 * one.before for one in trainer.erased)
    assert {"head", "layer_01"} <= {one.reading for one in trainer.erased}


def test_a_probe_reads_less_and_retained_rows_keep_their_answers(separable_data: Draw, tmp_path: Path) -> None:
    train = separable_data(60)
    model, data = learned(train), split_dataset(train, forget_classes=["frog"])
    options = {"learning_rate": 1e-3, "max_steps": 40, "energy": 0.9, "erasure_strength": 0.5}
    trainer, retain = unlearned(model, data, tmp_path, feature_erasure="head", **options), data.retain
    predicted = logits(model, retain).argmax(1)
    assert float((predicted == torch.as_tensor(retain[:]["label"])).float().mean()) > 0.95
    assert trainer.erased[0].after < trainer.erased[0].before


@pytest.mark.parametrize("targets", [None, ["fc2"], ["fc2", "classifier"]])
def test_no_answers_come_back(targets: list[str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("vit")
    forget, retain = rows_for(model, "vit")
    trainer = _erased(
        model, tmp_path, (forget, retain), feature_erasure="none", erasure_strength=0.9, target_forget_accuracy=0.5,
        peft_config=LoraConfig(r=4, target_modules=targets) if targets else None,
    )  # fmt: skip
    whole: dict[str, Any] = {}  # the model when all was erased

    def head() -> torch.Tensor:
        return head_weights(trainer.model, model.config.num_labels)[0].detach().clone()

    def known() -> float:
        """More is known the further a model has left the null space, until its head is changed."""
        leak = _leak(trainer)
        if leak > 1e-4 and not whole:
            whole.update(head=head(), leak=leak)
        lowered = not whole or not torch.equal(head(), whole["head"])
        return 0.0 if lowered else leak / whole["leak"]

    strengths = [one.strength for one in _erase(trainer, partial(_leak, trainer), known)]
    if targets == ["fc2"]:  # the head is not theirs to change
        most = 0.5 + 1 / len(trainer.feature_rows().held_out)
        assert 0.7 * most < _leak(trainer) / whole["leak"] <= most
        assert "%: all of it brings forgotten rows back" in caplog.text
        assert 0 < strengths[0] < 0.9
        assert strengths == pytest.approx([strengths[0]] * len(strengths))
        return
    assert strengths == [0.9] * len(strengths)
    assert "brings forgotten rows back" not in caplog.text
    gone = sorted({int(label) for label in forget[:]["label"]})
    moved = head() - whole["head"]
    assert [c for c in range(len(moved)) if float(moved[c].norm()) > 1e-4 * float(moved.norm())] == gone
    rows = _rows(trainer)
    (reading,) = find_readings(trainer.model, False, False, rows.retained[0])
    inputs = torch.cat([reading.rows(trainer.model, batch) for batch in rows.forgotten]).detach()
    for c in gone:
        assert float(inputs[rows.own == c].mean(0) @ moved[c]) == pytest.approx(-0.5, rel=0.1)


def test_a_strength_that_was_tried_before_is_what_it_was(tmp_path: Path) -> None:
    start = build("vit")
    data = rows_for(start, "vit")

    def run(*strengths: float) -> tuple[Any, torch.Tensor]:
        def choose(_reading: Reading, attempt: Attempt) -> float:
            for strength in strengths:
                attempt(strength)
            return strengths[0]

        trainer = _erased(copy.deepcopy(start), tmp_path, data, choose)
        return trainer.erased, logits(trainer.model, data[0])

    once, expected = run(0.3)
    again, outputs = run(0.3, 0.9, 0.6)
    assert again == once
    assert torch.equal(outputs, expected)


def test_what_two_limits_leave_is_what_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = _erased(
        build("vit"), tmp_path, feature_erasure="none", max_leak=0.6, erasure_strength=0.4, target_forget_accuracy=0.5,
        peft_config=LoraConfig(r=4, target_modules=["fc2"]),
    )  # fmt: skip
    whole: list[float] = []

    def leak() -> float:
        """As a share of that of all that is erased."""
        now = _leak(trainer)
        if now > 1e-4 and not whole:
            whole.append(now)
        return now / whole[0] if whole else 0.0

    # From a third of it on, forgotten rows are back.
    first = _erase(trainer, leak, lambda: float(leak() > 0.3))[0]
    assert 0.2 < leak() <= 0.3
    assert "exceeds the leak budget (max_leak 0.6) and brings forgotten rows back" in caplog.text
    assert (first.before - first.after) / first.before == pytest.approx(first.strength, rel=0.3)
    assert 0.05 < first.strength < 0.2


def test_bad_input(tmp_path: Path) -> None:
    for options, message in (
        ({"feature_erasure": "everything"}, "'everything' does not exist; choose from none, head, layers"),
        ({"erasure_strength": 1.5}, r"1.5 is outside \[0, 1\]"),
    ):
        with pytest.raises(UNSCError, match=f"{next(iter(options))}: {message}"):
            UNSCConfig(output_dir=str(tmp_path), **options)  # type: ignore[arg-type]
    model = build("gpt2")
    with pytest.raises(UNSCError, match="features: the head reads an input of shape"):
        find_readings(model, False, False, {})[0].rows(model, batch_of(rows_for(model, "gpt2")[0].select(range(2))))
    vit = build("vit")
    batch = batch_of(rows_for(vit, "vit")[0].select(range(2)))
    (reading,) = find_readings(vit, False, False, batch)
    with pytest.raises(UNSCError, match="returns 3 hidden states, number 9 was asked for"):
        Reading(9, reading.head).rows(vit, batch)
    with pytest.raises(UNSCError, match="no layer that may be changed writes"):
        _erased(vit, tmp_path, max_steps=1, feature_erasure="head", target_modules=["classifier"])


def test_a_writer_keeps_what_it_wrote_for_an_earlier_reading(tmp_path: Path) -> None:
    """One layer writes the last hidden state and the head's input: erasing the second leaves the first where it is."""
    trainer = _erased(build("vit"), tmp_path, erasure_strength=0.8)
    erased = {one.reading: one for one in trainer.erased}
    assert erased["layer_02"].writer == erased["head"].writer
    assert _left(trainer)["layer_02"] == pytest.approx(erased["layer_02"].after, rel=0.05)
