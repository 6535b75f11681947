"""Before the first step: statistics that are given, targets, when to stop, and input that cannot work."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.models import learned, logits, make_vit, relative
from helpers.rows import Data, Draw, random_rows, tensor_dataset, with_odd_labels
from helpers.training import Known, make_trainer, unlearned

from unsc_hf import ActivationStatistics, UNSCConfig, UNSCError, split_dataset
from unsc_hf.evaluation.membership import accuracy_gap, exposure
from unsc_hf.models.loading import model_label_names


def test_energy_one_refuses_statistics_of_some_rows(known: Known, tmp_path: Path) -> None:
    """A direction that only unread rows use would not be kept."""
    model, train, data = known
    some = ActivationStatistics.collect(model, train, rows_per_direction=10, progress=False)
    with pytest.raises(UNSCError, match="^statistics: were collected with a budget, but energy 1.0 keeps every"):
        make_trainer(model, data, tmp_path, statistics=some, energy=1.0).prepare_unlearning()
    make_trainer(model, data, tmp_path, statistics=some, energy=0.9).prepare_unlearning()


@pytest.mark.parametrize("null_space", ["retained", "none"])
def test_weights_that_diverged_are_named_and_end_no_comparison(null_space: str, known: Known, tmp_path: Path) -> None:
    """A control may diverge beside a run that did not."""
    trainer = make_trainer(
        known.model, known.data, tmp_path, energy=0.9, null_space=null_space, max_steps=1, check_steps=1,
        learning_rate=1e-3, max_leak=None, displacement_decay=0.0,
    )  # fmt: skip
    trainer.prepare_unlearning()
    trainer.plan.projection.relative_change = lambda: float("nan")  # type: ignore[method-assign]
    if null_space == "none":
        trainer.train()
    else:
        with pytest.raises(UNSCError, match="^learning_rate: 0.001 made weights infinite or not a number; lower it"):
            trainer.train()


def test_saved_statistics_spare_the_pass_and_give_the_same_result(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, train, data = known
    start = copy.deepcopy(model)
    ActivationStatistics.collect(model, train, progress=False).save_pretrained(tmp_path / "stats")
    trainer = make_trainer(model, data, tmp_path / "out", statistics=tmp_path / "stats", energy=0.9)
    read: list[int] = []
    collect = ActivationStatistics.collect
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStatistics, "collect", lambda *a, **k: read.append(len(a[1])) or collect(*a, **k))
        given = trainer.prepare_unlearning().subspace
        trainer.train()
    assert read == [len(trainer.rows.forget), len(trainer.rows.retain_held_out)]  # and not the retained rows
    assert not trainer.certify().held_out
    fresh = ActivationStatistics.collect(start, data.retain, progress=False).subspace(energy=0.9)
    for key, layer in fresh.layers.items():
        assert layer.ranks == given.layers[key].ranks
        torch.testing.assert_close(layer.basis.abs(), given.layers[key].basis.abs(), rtol=0, atol=1e-5)

    for network, rows, statistics, message in (
        (start, split_dataset(train, indices=range(5)), tmp_path / "stats", "still hold 5 of the 5 rows"),
        (make_vit(), data, tmp_path / "stats", "weights"),
        (start, data, collect(start, data.forget, progress=False), "retained class 0"),
    ):
        with pytest.raises(UNSCError, match=message):
            unlearned(network, rows, tmp_path / "out", statistics=statistics)


@pytest.mark.parametrize("strategy", ["top1", "soft", "second", "random", "nearest_mean"])
def test_pseudo_label_strategies_train(strategy: str, tmp_path: Path) -> None:
    data = split_dataset(random_rows(40, classes=4), forget_classes=[3])
    trainer = unlearned(make_vit(labels=4), data, tmp_path, pseudo_labels=strategy, energy=0.9)
    targets = trainer.plan.pseudo_labels
    hard = targets if targets.dim() == 1 else targets.argmax(1)
    assert set(hard.tolist()) <= {0, 1, 2}


def test_whole_classes_take_soft_pseudo_labels_at_the_stated_temperature(low_rank_data: Data, tmp_path: Path) -> None:
    model = make_vit()
    original = copy.deepcopy(model)
    trainer = unlearned(model, low_rank_data, tmp_path, pseudo_label_temperature=0.25, max_steps=1)
    forgotten = trainer.task.forgotten_classes
    expected = logits(original, trainer.rows.forget)
    expected[:, forgotten] = -torch.inf
    torch.testing.assert_close(trainer.plan.pseudo_labels, (expected / 0.25).softmax(1), atol=1e-5, rtol=1e-4)
    rows = split_dataset(random_rows(40), indices=range(12))
    assert make_trainer(make_vit(), rows, tmp_path / "rows").goal.pseudo_labels == "top1"
    with pytest.raises(UNSCError, match="pseudo_label_temperature"):
        UNSCConfig(output_dir=str(tmp_path), pseudo_label_temperature=0.0)


def test_rows_that_share_their_class_with_retained_rows(tmp_path: Path) -> None:
    trainer = unlearned(make_vit(), split_dataset(random_rows(40), indices=range(12)), tmp_path, energy=0.9)
    assert trainer.task.forgotten_classes == []
    assert not (trainer.plan.pseudo_labels == torch.as_tensor(trainer.rows.forget[:]["label"])).any()


def test_labels_in_a_column_of_another_name(low_rank_data: Data, tmp_path: Path) -> None:
    forget, retain = (part.rename_column("label", "species") for part in low_rank_data)
    trainer = unlearned(make_vit(), (forget, retain), tmp_path, eval_dataset={"retain": retain})
    assert 0 <= trainer.evaluate()["eval_retain_accuracy"] <= 1


def test_model_from_a_folder_loads_in_float32(low_rank_data: Data, tmp_path: Path) -> None:
    make_vit().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = make_trainer(str(tmp_path / "model"), low_rank_data, tmp_path / "out")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    with pytest.raises(UNSCError, match="cannot load"):
        make_trainer(str(tmp_path / "nowhere"), low_rank_data, tmp_path / "out")


def test_label_names_follow_the_ids_not_the_order_of_the_file() -> None:
    model = make_vit()
    model.config.id2label = {2: "c", 0: "a", 1: "b"}
    assert model_label_names(model) == ["a", "b", "c"]


def test_a_small_class_gives_enough_rows_for_validation(tmp_path: Path) -> None:
    """50 rows where there are as many as 125, else 40 %: a handful cannot show that a class is gone."""
    names = ["a", "b", "c"]
    retain = tensor_dataset(torch.randn(20, 3, 8, 8), [0, 1] * 10, names)
    for rows, expected in ((30, 12), (200, 50), (1000, 100)):
        forget = tensor_dataset(torch.randn(rows, 3, 8, 8), [2] * rows, names)
        trainer = make_trainer(make_vit(), (forget, retain), tmp_path)
        assert len(trainer.rows.forget_validation) == expected
        assert len(trainer.rows.forget) == rows - expected


@pytest.mark.parametrize("rows", [1, 23])
def test_single_rows_stop_when_they_look_like_unseen_ones(
    rows: int, separable_data: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last stretch is halved until the target is just reached, not passed; harm to other rows is warned of."""
    train, unseen = separable_data(30), with_odd_labels(separable_data(30), 24)
    trainer = make_trainer(
        learned(train), split_dataset(train, indices=range(0, 4 * rows, 4)), tmp_path, target_forget_accuracy=None,
        energy=0.95, max_steps=100, learning_rate=1e-3, check_steps=2, unseen_dataset=unseen,
    )  # fmt: skip
    assert trainer.goal.pseudo_labels == "matched"
    trainer.train()
    checks = [entry for entry in trainer.state.log_history if "leak" in entry]
    assert all("gap" not in entry for entry in checks)  # without rehearsal accuracy is not pushed
    assert trainer.stop_reason == "target"
    target = trainer.goal.target
    assert target == pytest.approx(0.5 + (12 * rows) ** -0.5)
    assert checks[-1]["exposure"] <= target
    if checks[0]["exposure"] > target + 0.1:
        assert checks[-1]["exposure"] >= target - 0.1
    unharmed = checks[-1]["retain_accuracy"] > 0.9
    told = "Accuracy on held-out retained rows fell" in caplog.text
    assert unharmed if rows == 1 else unharmed or told


def test_single_rows_are_matched_with_unseen_ones_as_they_are_known_now(separable_data: Draw, tmp_path: Path) -> None:
    """A model that forgets may know unseen rows less well than before; forgotten rows are compared with that."""
    train, unseen = separable_data(30), with_odd_labels(separable_data(30), 24)
    data = split_dataset(train, indices=range(0, 92, 4))
    trainer = make_trainer(
        learned(train), data, tmp_path, target_forget_accuracy=None, energy=0.5, max_steps=40, check_steps=10,
        objective="unsc_retain", lr_doubling_steps=2, unseen_dataset=unseen,
    )  # fmt: skip
    before = trainer.prepare_unlearning().pseudo_labels
    trainer.goal.target = -1.0  # never reached
    trainer.train()
    settled = 10 * trainer.args.learning_rate  # and not 2**20 times it
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(settled)

    def losses(rows: Dataset) -> torch.Tensor:
        found = logits(trainer.model, rows).double()
        return torch.nn.functional.cross_entropy(found, torch.as_tensor(rows["label"][:]), reduction="none")

    now = losses(unseen).sort().values
    last = [entry for entry in trainer.state.log_history if "exposure" in entry][-1]
    assert last["exposure"] == pytest.approx(exposure(losses(data[0]), now), abs=1e-6)
    assert abs(exposure(losses(data[0]), trainer.goal.unseen_before.row_losses()) - last["exposure"]) > 0.01
    labels = data[0]["label"][:]
    drawn = trainer.train_dataset.drawn.tolist()  # of the last of 20 epochs
    trainer.train_dataset.begin_epoch(0)
    assert trainer.train_dataset.drawn.tolist() != drawn
    trainer.train_dataset.begin_epoch(19)
    assert trainer.train_dataset.drawn.tolist() == drawn
    right = {
        name: float((logits(trainer.model, part).argmax(1) == torch.as_tensor(part["label"][:])).float().mean())
        for name, part in (("forgotten", data[0]), ("unseen", unseen))
    }
    expected = accuracy_gap(right["forgotten"], right["unseen"], len(data[0]))
    assert last["gap"] == pytest.approx(expected, abs=1e-6)
    known = (-now).exp()
    for row, label, old in zip(trainer.goal.matched[0].now, labels, before, strict=True):
        assert float((known - row[label]).abs().min()) < 1e-5
        assert float(row.sum()) == pytest.approx(1, abs=1e-5)
        assert not torch.equal(row, old)


def test_rows_that_look_like_unseen_ones_are_hardly_moved(separable_data: Draw, tmp_path: Path) -> None:
    """What a model knows no better than rows it never saw is forgotten already."""
    train, model = separable_data(30), learned(separable_data(30))  # has seen none of them
    data, before = split_dataset(train, indices=range(0, 90, 4)), logits(model, train)
    options = {"target_forget_accuracy": None, "energy": 0.9, "max_steps": 100, "unseen_dataset": data[0]}
    trainer = unlearned(model, data, tmp_path, **options)
    assert trainer.stop_reason == "target"
    assert relative(logits(trainer.model, train), before) < 0.05


# ---- bad input ------------------------------------------------------------------------------------------------------
def test_no_capacity_says_how_far_the_rule_is(tmp_path: Path) -> None:
    data = split_dataset(random_rows(300), forget_classes=[2])
    trainer = make_trainer(make_vit(hidden=16), data, tmp_path, energy=1.0)
    with pytest.raises(UNSCError, match=r"no layer any capacity; .* at an energy of 0\.\d+") as refusal:
        trainer.train()
    advised = float(re.search(r"energy of (0\.\d+)", str(refusal.value))[1])
    unlearned(make_vit(hidden=16), data, tmp_path, energy=advised - 0.01)


def test_labels_that_are_not_the_models_are_refused(low_rank_data: Data, tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match="2 labels.*label 2"):
        make_trainer(make_vit(labels=2), low_rank_data, tmp_path / "out")
    model = make_vit()
    model.config.id2label = {0: "b", 1: "a", 2: "c"}
    with pytest.raises(UNSCError, match="calls label 0 'b', the data set 'a'"):
        make_trainer(model, low_rank_data, tmp_path / "out")


def test_empty_and_wrong_inputs(low_rank_data: Data, tmp_path: Path) -> None:
    forget, retain = low_rank_data
    for rows, message in (
        ((forget.select([]), retain), "forget_dataset: has no rows"),
        ((forget, retain.select([])), "retain_dataset: has no rows"),
        (([], retain), "forget_dataset: got list"),
        ((forget.select(range(20)), forget.select(range(20, 40))), "single class"),
    ):
        with pytest.raises(UNSCError, match=message):
            make_trainer(make_vit(), rows, tmp_path / "out")
    with pytest.raises(UNSCError, match="label_column: no column 'klass'.*pixel_values, label"):
        make_trainer(make_vit(), low_rank_data, tmp_path / "out", label_column="klass")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("energy", 0, "energy"),
        ("energy", 1.01, "energy"),
        ("subspace_rule", "best", "subspace_rule"),
        ("pseudo_labels", "guess", "pseudo_labels"),
        ("target_forget_accuracy", 2.0, "share, not percent"),
        ("max_leak", -1.0, "max_leak"),
        ("max_flips", 0.0, r"max_flips: 0.0 is outside \(0, 1\]"),
        ("max_flips", 1.5, r"max_flips: 1.5 is outside \(0, 1\]"),
        ("displacement_decay", 1.0, r"displacement_decay: 1.0 is outside \[0, 1\)"),
        ("displacement_decay", -0.1, "displacement_decay"),
        ("check_steps", 0, "check_steps"),
        ("max_statistics_memory", "lots", "max_statistics_memory: 'lots' is not a size"),
        ("hub_strategy", "every_save", "half-unlearned"),
        ("deepspeed", "ds.json", "use DDP"),
        ("remove_unused_columns", True, "drop the pseudo-labels"),
        ("load_best_model_at_end", True, "before unlearning"),
        ("bf16_full_eval", True, "round the weights"),
        ("null_space", "some", "null_space"),
    ],
)
def test_bad_options(option: str, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match=message):
        UNSCConfig(output_dir=str(tmp_path / "out"), **{option: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"subspace_rule": "rank", "subspace_size": 999}, "lower subspace_size"),
        ({"subspace_rule": "class_energy"}, "use subspace_rule 'energy'"),
    ],
)
def test_no_capacity_advises_by_rule(options: dict[str, Any], advice: str, tmp_path: Path) -> None:
    data = split_dataset(random_rows(300), forget_classes=[2])
    with pytest.raises(UNSCError, match=advice):
        unlearned(make_vit(hidden=16), data, tmp_path, **options)
