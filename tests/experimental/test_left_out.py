"""How well rows would be known that were never seen: how rows to forget rank, and which unseen rows are like them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.architectures import MODELS, build, rows_for
from helpers.models import learned, make_vit
from helpers.training import GOOD, make_trainer
from peft import LoraConfig, get_peft_model
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from unsc_hf import UNSCConfig, UNSCError, split_dataset
from unsc_hf.data.inputs import default_collator
from unsc_hf.data.selection import evenly_spaced
from unsc_hf.experimental import left_out
from unsc_hf.experimental.left_out import (
    LeftOut,
    counterparts,
    left_out_ease,
    left_out_margins,
    mean_quantiles,
    neighbour_margins,
    read_rows,
    untrained_twin,
)
from unsc_hf.models.outputs import Outputs
from unsc_hf.objectives.pseudo_labels import Matching
from unsc_hf.trainer import goals
from unsc_hf.trainer.sharding import check_fsdp
from unsc_hf.utils.fingerprint import weight_hash


def wrong(data: Dataset, rows: list[int]) -> Dataset:
    """The same rows, some with the label of another class."""
    labels = data["label"][:].tolist()
    for row in rows:
        labels[row] = (labels[row] + 1) % 3
    return data.remove_columns("label").add_column("label", labels).cast(data.features).with_format("torch")


def test_quantiles_are_places_in_the_order_and_equal_values_share_one() -> None:
    values = np.random.default_rng().normal(size=(1, 50))
    places = mean_quantiles(values)
    np.testing.assert_allclose(places, (values[0].argsort().argsort() + 0.5) / 50)
    np.testing.assert_allclose(mean_quantiles(np.array([[1.0, 3.0, 1.0, -np.inf]])), [0.5, 0.875, 0.5, 0.125])
    two = np.random.default_rng().normal(size=(2, 50))
    np.testing.assert_allclose(mean_quantiles(two), (mean_quantiles(two[:1]) + mean_quantiles(two[1:])) / 2)


@pytest.mark.parametrize(("rows", "unseen", "each"), [(20, 200, 10), (20, 19, 1), (2, 5000, 100), (3, 2, 1)])
def test_counterparts_are_the_nearest_unseen_rows(rows: int, unseen: int, each: int) -> None:
    rng = np.random.default_rng()
    ease, others = rng.uniform(0.5, 1, rows), rng.uniform(0, 1, unseen)
    found = np.array(counterparts(ease, others)).reshape(rows, each)
    for row, chosen in zip(ease, found, strict=True):
        apart = np.abs(others - row)
        assert len(set(chosen.tolist())) == each
        assert apart[chosen].max() <= np.delete(apart, chosen).min(initial=np.inf)
    if unseen == 200:  # rows that are easier by nature are held against easier ones
        assert others[found].mean() == pytest.approx(ease.mean(), abs=0.05)


def test_margins_are_those_of_a_discriminant_that_never_saw_the_rows() -> None:
    rng = np.random.default_rng()
    means = 3 * rng.normal(size=(3, 5))
    labels = rng.integers(3, size=300)
    x = means[labels] + rng.normal(size=(300, 5))
    asked = means[labels[:40]] + 3 * rng.normal(size=(40, 5))
    found = left_out_margins(([x], labels), [([asked[:10]], labels[:10]), ([asked[10:]], labels[10:40])])
    assert found.shape == (1, 40)
    known = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, labels).predict(asked) == labels[:40]
    np.testing.assert_array_equal(found[0] > 0, known)

    # Of two classes there is one score, and a class that the retained rows lack is not known at all.
    two = labels < 2
    found = left_out_margins(([x[two]], labels[two]), [([asked], labels[:40])])
    known = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x[two], labels[two]).predict(asked)
    np.testing.assert_array_equal(found[0] > 0, known == labels[:40])
    assert np.isneginf(found[0, labels[:40] == 2]).all()
    with pytest.raises(UNSCError, match="single class"):
        left_out_margins(([x], np.zeros(300)), [([asked], labels[:40])])


def test_neighbours_see_near_duplicates_that_no_line_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "_ROWS_AT_ONCE", 7)
    rng = np.random.default_rng()
    x, labels = rng.normal(size=(200, 6)), rng.integers(3, size=200)  # labels that no linear rule could tell
    source = rng.choice(200, 40, replace=False)
    asked, truth = x[source] + 0.01 * rng.normal(size=(40, 6)), labels[source].copy()
    truth[::4] = (truth[::4] + 1) % 3  # a fourth of them would be got wrong
    wide, parts = x * 10.0 ** np.arange(6), [slice(0, 15), slice(15, 40)]
    found = neighbour_margins(
        ([x, wide], labels), [([asked[part], asked[part] * 10.0 ** np.arange(6)], truth[part]) for part in parts]
    )
    assert found.shape == (2, 40)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)  # in units of their spread
    near, rows = (x - x.mean(0)) / x.std(0), (asked - x.mean(0)) / x.std(0)
    apart = np.linalg.norm(rows[:, None] - near[None], axis=2)
    own = truth[:, None] == labels[None]
    expected = np.where(own, np.inf, apart).min(1) - np.where(own, apart, np.inf).min(1)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    assert ((found[0] > 0) == (np.arange(40) % 4 > 0)).all()
    ease = left_out_ease(([x], labels), [([asked], truth)])
    places = [mean_quantiles(by(([x], labels), [([asked], truth)])) for by in (left_out_margins, neighbour_margins)]
    np.testing.assert_allclose(ease, np.mean(places, axis=0))

    # A class that the retained rows lack has no neighbour at all, and a feature that never changes says nothing.
    few = labels < 2
    still = np.concatenate([x, np.ones((200, 1))], axis=1)
    found = neighbour_margins(
        ([still[few]], labels[few]), [([np.concatenate([asked, np.ones((40, 1))], axis=1)], truth)]
    )
    assert np.isneginf(found[0, truth == 2]).all()
    assert np.isfinite(found[0, truth < 2]).all()


def test_the_twin_has_learned_nothing_and_leaves_no_trace() -> None:
    model = make_vit()
    before, state = weight_hash(model), torch.get_rng_state()
    twin = untrained_twin(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert weight_hash(model) == before
    assert type(twin) is type(model)
    assert twin.config is not model.config
    assert twin.config.to_dict() == model.config.to_dict()
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    ours, theirs = model.get_submodule(name).weight, twin.get_submodule(name).weight
    assert not torch.allclose(ours, theirs, atol=1e-2)
    assert weight_hash(untrained_twin(model, 3)) == weight_hash(twin)
    assert weight_hash(untrained_twin(model, 4)) != weight_hash(twin)
    adapted = get_peft_model(make_vit(), LoraConfig(target_modules="all-linear"))
    assert weight_hash(untrained_twin(adapted, 3)) == weight_hash(twin)


def test_hidden_states_and_the_heads_input_are_read(separable_data: Callable[[int], Dataset]) -> None:
    model, data = make_vit(layers=2), separable_data(4)
    features, labels = read_rows(model, data, default_collator(None), batch_size=5)
    assert [x.shape for x in features] == [(12, 48)] * 3  # of two layers, and of the head
    assert labels.tolist() == data["label"][:].tolist()
    with torch.no_grad():
        states = model(pixel_values=data["pixel_values"][:], output_hidden_states=True).hidden_states
    np.testing.assert_allclose(features[0], states[1].mean(1), atol=1e-5)
    np.testing.assert_allclose(features[1], states[2].mean(1), atol=1e-5)

    class Plain(nn.Module):
        """A classifier without hidden states."""

        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(192, 3)
            self.config = SimpleNamespace(num_labels=3)

        def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> ImageClassifierOutput:
            return ImageClassifierOutput(logits=self.classifier(pixel_values.flatten(1)))

    features, _ = read_rows(Plain(), data, default_collator(None))
    assert len(features) == 1
    np.testing.assert_allclose(features[0], data["pixel_values"][:].flatten(1), atol=1e-6)


def test_rows_that_nobody_would_guess_come_last_however_well_the_original_knows_them(
    separable_data: Callable[[int], Dataset],
) -> None:
    """And unseen rows are chosen to be as hard: as many of them are mislabelled as of the rows to forget."""
    forget = wrong(separable_data(20), odd := list(range(0, 60, 6)))
    unseen = wrong(separable_data(40), list(range(0, 120, 2)))
    train = separable_data(30)
    found = LeftOut.of(learned(forget), train, forget, unseen, default_collator(None), batch_size=32)
    is_odd = np.isin(np.arange(60), odd)
    assert roc_auc_score(~is_odd, found.order.numpy()) > 0.95
    assert len(found.counterparts) == 120
    share = np.mean(np.array(found.counterparts) % 2 == 0)
    assert share == pytest.approx(1 / 6, abs=0.08)  # of the unseen rows it is half


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_something_to_read(name: str) -> None:
    model = build(name)
    rows, _ = rows_for(model, name)
    labels = [i % 3 for i in range(len(rows))]
    rows = rows.remove_columns("label").add_column("label", labels).cast(rows.features).with_format("torch")
    parts = [rows.select(range(start, start + 8)) for start in (0, 8, 16)]
    collate = default_collator(None)
    features, _ = read_rows(untrained_twin(model, 0), parts[0], collate, batch_size=3)
    assert features
    assert all(x.shape[0] == 8 and np.isfinite(x).all() for x in features)
    assert len(LeftOut.of(model, *parts, collate, batch_size=3).order) == 8


def test_matching_by_an_order() -> None:
    forget = Outputs(torch.randn(30, 4), None, torch.randint(4, (30,)))
    unseen = Outputs(torch.randn(30, 4), None, torch.randint(4, (30,)))
    order = torch.randn(30)
    true = Matching.of([forget], [unseen], order).labels(forget).gather(1, forget.labels[:, None])[:, 0]
    expected = unseen.logits.softmax(1).gather(1, unseen.labels[:, None])[:, 0].sort().values
    torch.testing.assert_close(true[order.argsort()], expected)


def test_a_run(separable_data: Callable[[int], Dataset], tmp_path: Path) -> None:
    """Targets follow the order, the unseen rows in use are the counterparts, and the original stays until training."""
    train = wrong(separable_data(30), [0, 8, 40])
    unseen = wrong(separable_data(30), list(range(0, 90, 3)))
    data = split_dataset(train, indices=range(0, 88, 4))
    trainer = make_trainer(
        learned(train), data, tmp_path, target_forget_accuracy=None, energy=0.5, max_steps=20, check_steps=5,
        objective="unsc_retain", pseudo_labels="left_out", trainer_kwargs={"unseen_dataset": unseen},
    )  # fmt: skip
    before = weight_hash(trainer.model)
    plan = trainer.prepare_unlearning()
    assert weight_hash(trainer.model) == before
    matching = trainer.goal.matched[0].matching
    true = plan.pseudo_labels.gather(1, data[0]["label"][:][:, None])[:, 0]
    assert bool((true[matching.order.argsort()].diff() >= 0).all())
    assert len(trainer.goal.unseen) == 22 * 4  # of 90 unseen rows four for each of 22
    trainer.prepare_unlearning()
    assert len(trainer.goal.unseen) == 22 * 4
    hardest = matching.order.argsort()[:3].tolist()
    assert set(hardest) == {0, 2, 10}  # rows 0, 8 and 40 of the training data
    trainer.train()
    assert trainer.stop_reason in ("target", "max_steps")
    assert trainer.certify()


def test_twins_choose_the_unseen_rows_and_help_the_original_to_order(
    separable_data: Callable[[int], Dataset],
) -> None:
    taught, forget, unseen = separable_data(10), wrong(separable_data(4), [1, 7]), wrong(separable_data(8), [2, 9, 15])
    collate, model = default_collator(None), make_vit()

    def ease(of: nn.Module) -> np.ndarray:
        rows = [read_rows(of, part, collate) for part in (taught, forget, unseen)]
        return left_out_ease(rows[0], rows[1:])

    found = LeftOut.of(model, taught, forget, unseen, collate, seed=5)
    twins = np.mean([ease(untrained_twin(model, 5 + i)) for i in range(3)], axis=0)
    np.testing.assert_allclose(found.order, (twins + ease(model))[:12], atol=1e-9)
    assert found.counterparts == counterparts(twins[:12], twins[12:])


def test_of_many_rows_a_part_is_read(
    separable_data: Callable[[int], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goals, "LEFT_OUT_ROWS", 30)
    read: list[int] = []
    monkeypatch.setattr(
        left_out, "read_rows", lambda model, rows, *rest: read.append(len(rows)) or read_rows(model, rows, *rest)
    )
    data, unseen = split_dataset(separable_data(20), indices=range(0, 60, 4)), separable_data(20)
    trainer = make_trainer(
        make_vit(), data, tmp_path, target_forget_accuracy=None, energy=0.9, pseudo_labels="left_out",
        trainer_kwargs={"unseen_dataset": unseen},
    )  # fmt: skip
    trainer.prepare_unlearning()
    assert read == [30, 15, 30] * 4  # retained, to forget, unseen: of three twins and the original
    kept = unseen["pixel_values"][:][evenly_spaced(np.arange(60), 30)]
    assert all(any(torch.equal(row, one) for one in kept) for row in trainer.goal.unseen["pixel_values"][:])


def test_requests_that_it_is_not_for(separable_data: Callable[[int], Dataset], tmp_path: Path) -> None:
    train = separable_data(10)
    whole, rows = split_dataset(train, forget_classes=["frog"]), split_dataset(train, indices=[1, 15])
    options = {"pseudo_labels": "left_out"}
    with pytest.raises(UNSCError, match="'left_out' is for single rows.*use 'soft'"):
        make_trainer(make_vit(), whole, tmp_path, trainer_kwargs={"unseen_dataset": train}, **options)
    with pytest.raises(UNSCError, match="'left_out' is for single rows.*give rows"):
        make_trainer(make_vit(), rows, tmp_path, target_forget_accuracy=0.5, **options)
    with pytest.raises(UNSCError, match="'left_out' is not supported with FSDP"):
        check_fsdp(SimpleNamespace(**GOOD), UNSCConfig(output_dir=str(tmp_path), **options))
    assert UNSCConfig(output_dir=str(tmp_path), use_cpu=True, **options).pseudo_labels == "left_out"
