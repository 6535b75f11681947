"""Each method's defining property, on a tiny model that knows its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers.training import Known, quiet_config

from unsc_hf import UNSCError, split_dataset
from unsc_hf.comparison.methods import METHODS, Workbench
from unsc_hf.comparison.methods.masked import LOW
from unsc_hf.comparison.methods.salun import GradientMask
from unsc_hf.comparison.references.texts import TextPlan
from unsc_hf.models.outputs import collect_outputs
from unsc_hf.objectives import OBJECTIVES, Terms
from unsc_hf.utils.fingerprint import weight_hash

FORGOTTEN = 2


@pytest.fixture
def bench(known: Known, tmp_path: Path) -> Workbench:
    config = quiet_config(tmp_path, energy=0.9, max_steps=15, learning_rate=1e-3, max_leak=None)
    return Workbench(known.model, *known.data, config, None)


def logits(bench: Workbench, model: Any, rows: Dataset) -> torch.Tensor:
    return collect_outputs(model, bench.reader.prepare(rows), bench.reader.collate).logits


def change(bench: Workbench, model: Any) -> dict[str, torch.Tensor]:
    """Displacement of each trained layer, (groups, out, width)."""
    before = {layer.name: layer for layer in bench.layers(bench.original)}
    return {
        layer.name: layer.as_matrix(layer.weight.detach() - before[layer.name].weight.detach())
        for layer in bench.layers(model)
    }


def outside(bench: Workbench, moved: dict[str, torch.Tensor]) -> float:
    """Share of a displacement that lies in the retained subspace, largest over layers."""
    shares = []
    for name, matrix in moved.items():
        space = bench.plan.subspace[name]
        kept = space.basis[0, :, : space.ranks[0]]
        change = matrix[0].double()
        shares.append(float((change @ kept).norm() / change.norm().clamp_min(1e-12)))
    return max(shares)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_original_alone_and_changes_trained_weights_only(name: str, bench: Workbench) -> None:
    before = weight_hash(bench.original)
    model = bench.run(METHODS[name].run, dict(METHODS[name].settings[0]))
    assert weight_hash(bench.original) == before
    assert bench.seconds > 0
    trained = {layer.weight_name for layer in bench.layers(model)}
    theirs, ours = model.state_dict(), bench.original.state_dict()
    for key, value in theirs.items():
        if key not in trained and not (name == "masked" and key == "classifier.bias"):
            assert torch.equal(value, ours[key]), key
    leak = bench.leak(model)
    assert leak is not None
    assert leak >= 0
    assert weight_hash(bench.original) == before
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert all(hook.__module__.startswith("transformers.") for hook in hooks)  # they ask for hidden states


def test_methods_that_choose_have_the_same_number_of_tries() -> None:
    assert {len(m.settings) for m in METHODS.values()} == {1, 3}
    assert [m.name for m in METHODS.values() if len(m.settings) == 1] == ["masked"]


PROJECTED = ("unsc", "true_label_ascent", "random_pseudo_labels")
UNPROJECTED = (
    "no_null_space", "random_projector", "random_label", "gradient_ascent", "neggrad_plus", "scrub", "fine_tune",
    "salun",
)  # fmt: skip


@pytest.mark.parametrize("name", [*PROJECTED, *UNPROJECTED])
def test_projected_methods_stay_in_the_null_space_and_others_leave_it(name: str, bench: Workbench) -> None:
    share = outside(bench, change(bench, bench.run(METHODS[name].run, dict(METHODS[name].settings[0]))))
    assert share < 1e-4 if name in PROJECTED else share > 1e-2
    assert bench.steps  # the trainer made it


def test_the_random_projector_has_the_rank_of_the_real_one(bench: Workbench) -> None:
    moved = change(bench, bench.run(METHODS["random_projector"].run, {}))
    for name, matrix in moved.items():
        values = torch.linalg.svdvals(matrix[0].double())
        assert int((values > 1e-4 * values[0]).sum()) <= bench.plan.subspace[name].capacity


def test_masking_changes_the_forgotten_logit_and_nothing_else(bench: Workbench) -> None:
    model = bench.run(METHODS["masked"].run, {})
    before, after = (logits(bench, m, bench.retain) for m in (bench.original, model))
    assert torch.equal(before[:, :FORGOTTEN], after[:, :FORGOTTEN])
    assert float(after[:, FORGOTTEN].max()) < LOW / 2
    assert not (logits(bench, model, bench.forget).argmax(1) == FORGOTTEN).any()


def test_the_teacher_of_scrub_is_the_original(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Terms] = []
    spy = replace(OBJECTIVES["scrub"], run=lambda terms, **_: seen.append(terms) or terms.loss())
    monkeypatch.setitem(OBJECTIVES, "scrub", spy)
    bench.unlearn(null_space="none", objective="scrub")
    first, last = seen[0], seen[-1]
    assert first.teacher is not None
    torch.testing.assert_close(first.logits, first.teacher, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first.retain_logits, first.retain_teacher, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(last.logits, last.teacher, atol=1e-3)


def test_boundary_shrink_labels_are_what_a_signed_gradient_step_is_taken_for(bench: Workbench) -> None:
    from unsc_hf.comparison.methods import boundary as module

    batch = next(bench.batches(bench.forget, shuffle=False))
    embed = bench.original.vit.embeddings.patch_embeddings
    start = embed(batch["pixel_values"]).detach().requires_grad_()
    handle = embed.register_forward_hook(lambda *_: start)
    loss = torch.nn.functional.cross_entropy(bench.original(batch["pixel_values"]).logits, batch["labels"])
    (gradient,) = torch.autograd.grad(loss, start)
    handle.remove()
    moved = start + module.BOUND * (start.max() - start.min()) * gradient.sign()
    handle = embed.register_forward_hook(lambda *_: moved)
    expected = bench.original(batch["pixel_values"]).logits.detach()
    handle.remove()
    torch.testing.assert_close(module.attacked_logits(bench.original, batch), expected, atol=1e-4, rtol=1e-3)


def test_boundary_expand_returns_a_head_of_the_old_size(bench: Workbench) -> None:
    model = bench.run(METHODS["boundary_expand"].run, {"learning_rate": 1e-3})
    assert model.classifier.weight.shape == bench.original.classifier.weight.shape
    assert model.config.to_dict()["id2label"] == bench.original.config.to_dict()["id2label"]
    rows = bench.forget
    before, after = (logits(bench, m, rows).softmax(1)[:, FORGOTTEN].mean() for m in (bench.original, model))
    assert after < before


def test_fisher_noise_is_largest_where_retained_rows_do_not_care(bench: Workbench) -> None:
    model = bench.run(METHODS["fisher"].run, {"scale": 0.3})
    found = bench.gradients(bench.fresh(), bench.retain, 512, batch_size=8, squared=True)
    for layer, start in zip(bench.layers(model), bench.layers(bench.original), strict=True):
        information = found[layer.weight_name]
        size = start.weight.square().mean().sqrt()
        wanted = 0.3 * size * (information / information.mean()).clamp_min(1e-4) ** -0.25
        drawn = ((layer.weight - start.weight) / wanted).detach()
        assert float(drawn.std()) == pytest.approx(1.0, abs=0.25)


def test_squared_gradients_of_single_rows_are_the_fisher_diagonal(bench: Workbench) -> None:
    rows = bench.retain.select(range(3))
    found = bench.gradients(bench.original, rows, 3, batch_size=1, squared=True)
    name = bench.layers(bench.original)[-1].weight_name
    weight = dict(bench.original.named_parameters())[name]
    expected = torch.zeros_like(weight)
    for row in rows:
        loss = torch.nn.functional.cross_entropy(
            bench.original(row["pixel_values"][None]).logits, torch.tensor([int(row["label"])])
        )
        expected += torch.autograd.grad(loss, weight)[0] ** 2 / 3
    torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-9)


def test_ssd_shrinks_what_matters_for_forgetting_and_leaves_the_rest(bench: Workbench) -> None:
    model = bench.run(METHODS["ssd"].run, {"alpha": 1.5})
    moved = 0
    for layer, start in zip(bench.layers(model), bench.layers(bench.original), strict=True):
        changed = layer.weight != start.weight
        moved += int(changed.sum())
        assert (layer.weight.abs() <= start.weight.abs()).all()
        assert (layer.weight * start.weight >= 0).all()
    assert moved > 0
    same = bench.run(METHODS["ssd"].run, {"alpha": 1e9})
    assert weight_hash(same) == weight_hash(bench.original)


def test_salun_moves_only_the_salient_half(bench: Workbench) -> None:
    model = bench.run(METHODS["salun"].run, {"learning_rate": 1e-3})
    trained = sum(layer.weight.numel() for layer in bench.layers(model))
    moved = sum(
        int((layer.weight != start.weight).sum())
        for layer, start in zip(bench.layers(model), bench.layers(bench.original), strict=True)
    )
    assert 0.3 * trained < moved <= 0.51 * trained
    weight = torch.nn.Linear(3, 2)
    weight.weight.grad = torch.ones(2, 3)
    GradientMask({"weight": torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)}).on_pre_optimizer_step(
        None, None, None, model=weight
    )
    assert weight.weight.grad.tolist() == [[1, 0, 1], [0, 0, 1]]


def test_requests_of_single_rows_and_unknown_settings_are_refused(
    bench: Workbench, separable_data: Callable[[int], Dataset]
) -> None:
    with pytest.raises(UNSCError, match="settings: 'lerning_rate'"):
        bench.unlearn(lerning_rate=1e-3)
    forget, retain = split_dataset(separable_data(20), indices=[0, 1, 30])
    with pytest.raises(UNSCError, match="whole classes"):
        Workbench(bench.original, forget, retain, bench.config, None)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_texts_of_all_lengths(name: str, tmp_path: Path) -> None:
    """A batch of texts may run in pieces of like length, which whoever watches its layers has to expect."""
    lengths = [1 + 7 * row % 23 for row in range(60)]
    words = [" ".join([str(row), *["word", "other", "third"] * 8][: length + 1]) for row, length in enumerate(lengths)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["cat", "dog", "frog"])})
    data = Dataset.from_dict({"text": words, "label": [row % 3 for row in range(60)]}, features=features)
    model, tokenizer = TextPlan("tiny", vocabulary_size=100, max_length=32).start(data, ["cat", "dog", "frog"])
    forget, retain = split_dataset(data, forget_classes=["frog"])
    config = quiet_config(tmp_path, energy=0.5, max_steps=2, check_steps=2, learning_rate=1e-3, max_leak=None)
    bench = Workbench(model, forget, retain, config, tokenizer)
    found = bench.run(METHODS[name].run, dict(METHODS[name].settings[0]))
    assert collect_outputs(found, bench.reader.prepare(retain), bench.reader.collate).logits.isfinite().all()
