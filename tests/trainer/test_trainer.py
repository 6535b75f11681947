"""The trainer keeps its promise through the real Trainer, optimisers and accelerate; it refuses what would break it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import copied, learned, logits, make_vit
from helpers.rows import Data, Draw, with_odd_labels
from helpers.training import (
    EXACT,
    Known,
    assert_promise,
    assert_resumed_run_ends_as_a_whole_one,
    drift,
    make_trainer,
    quiet_config,
    unlearned,
)
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from unsc_hf import UNSCError, UNSCTrainer, split_dataset
from unsc_hf.data.sources import load_image_dataset
from unsc_hf.evaluation.flips import count_flips
from unsc_hf.models.hooks import capture_inputs
from unsc_hf.models.layers import find_layers
from unsc_hf.nullspace.projection import NullSpaceProjection
from unsc_hf.nullspace.subspace import LayerSubspace
from unsc_hf.trainer.checks import Check
from unsc_hf.utils.fingerprint import weight_hash


class KeepGoing(TrainerCallback):
    """Undoes an early stop, so that every optimiser takes all its steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            control.should_training_stop = False


@pytest.mark.parametrize("case", EXACT)
def test_retained_outputs_do_not_move(case: str, exact_data: Data, tmp_path: Path) -> None:
    torch._dynamo.reset()  # nothing was compiled before
    assert_promise(drift(make_vit(labels=10), exact_data, tmp_path, **{"learning_rate": 2e-4, **EXACT[case]}))


def test_without_displacement_projection_adamw_breaks_the_promise(
    exact_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NullSpaceProjection, "project_displacements", lambda *args, **kwargs: None)
    measured = drift(make_vit(labels=10), exact_data, tmp_path, learning_rate=2e-4, **EXACT["adamw with decay"])
    assert measured.retain > 1e-3


def test_only_protected_weights_move(low_rank_data: Data, tmp_path: Path) -> None:
    model = make_vit()
    before = copied(model.named_parameters())
    trainer = unlearned(model, low_rank_data, tmp_path, weight_decay=0.1)
    trained = {layer.weight_name for layer in trainer.plan.selection.layers}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_accumulation_1x8_and_8x1_agree(low_rank_data: Data, tmp_path: Path) -> None:
    start = make_vit()
    ends = []
    for batch, steps in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3}
        ends.append(unlearned(copy.deepcopy(start), low_rank_data, tmp_path, optim="sgd", **options).model.state_dict())
    for name in start.state_dict():
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6)


def test_dropout_is_off_while_unlearning_with_and_without_checkpointing(low_rank_data: Data, tmp_path: Path) -> None:
    results = []
    state = make_vit().state_dict()
    for rate, checkpointing in ((0.0, False), (0.5, False), (0.5, True)):
        model = make_vit(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
        model.load_state_dict(state)
        unlearned(model, low_rank_data, tmp_path, optim="sgd", activation_checkpointing=checkpointing)
        results.append(model.vit.layers[0].mlp.fc1.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-7)


def test_forgets_keeps_and_reports(separable_data: Draw, tmp_path: Path) -> None:
    train, test = separable_data(40), separable_data(15)
    data, seen = split_dataset(train, forget_classes=["frog"]), split_dataset(test, forget_classes=["frog"])._asdict()
    options = {"energy": 0.99, "max_steps": 200, "learning_rate": 1e-3}
    trainer = make_trainer(learned(train), data, tmp_path / "out", eval_dataset=seen, **options)
    before = trainer.evaluate()
    assert before["eval_forget_accuracy"] > 0.9
    trainer.train()
    after = trainer.evaluate()
    assert trainer.stop_reason == "target"
    assert after["eval_forget_accuracy"] <= 0.1
    assert after["eval_retain_accuracy"] >= 0.9
    history = [entry for entry in trainer.state.log_history if "leak" in entry]
    assert history[0]["leak"] == 0
    assert history[-1]["forget_accuracy"] == 0
    assert {"forget_accuracy", "forget_loss", "retain_accuracy", "leak", "step"} <= set(history[-1])
    certificate = trainer.certify()
    assert certificate.held_out
    assert 0 < certificate.leak < 0.2
    assert certificate.drift.agreement > 0.8
    assert set(certificate.leak_per_layer) == {layer.name for layer in trainer.plan.selection.layers}

    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, test), logits(trainer.model, test))
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_leak_budget_keeps_the_last_state_within(known: Known, tmp_path: Path) -> None:
    options = {"energy": 0.5, "max_leak": 0.02, "learning_rate": 3e-4, "check_steps": 1, "max_steps": 100}
    trainer = unlearned(known.model, known.data, tmp_path, **options)
    assert trainer.stop_reason == "leak_budget"
    leaks = [entry["leak"] for entry in trainer.state.log_history if "leak" in entry]
    assert leaks[-1] > 0.02
    assert trainer.certify().leak == pytest.approx(leaks[-2])
    assert trainer.certify().leak <= 0.02


class Killed(TrainerCallback):
    """Stops the process, as far as the trainer can tell."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stubborn", "rises", "reason", "steps"),
    [(0.02, 0, "plateau", 30), (0.02, 35, "plateau", 55), (0.2, 0, "max_steps", 60)],
)
def test_a_few_stubborn_rows_end_a_run_once_the_loss_stays_and_many_do_not(
    stubborn: float,
    rises: int,
    reason: str,
    steps: int,
    low_rank_data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        UNSCTrainer,
        "check",
        lambda t: Check(stubborn if t.state.global_step > 9 else 0.5, 1.0 + min(t.state.global_step, rises), 1.0, 0.0),
    )
    options = {"max_steps": 60, "check_steps": 5, "save_strategy": "steps", "save_steps": 20}
    model = make_vit()
    with pytest.raises(KeyboardInterrupt):
        unlearned(copy.deepcopy(model), low_rank_data, tmp_path, callbacks=[Killed(23)], **options)
    trainer = make_trainer(model, low_rank_data, tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.stop_reason, trainer.state.global_step) == (reason, steps)


def test_a_run_goes_on_while_more_rows_are_known_than_unseen_ones(
    low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(trainer: UNSCTrainer) -> Check:
        return Check(0.9, 0.5, 1.0, 0.0, exposure=0.5, gap=0.1 if trainer.state.global_step < 10 else 0.0)

    monkeypatch.setattr(UNSCTrainer, "check", check)
    options = {"max_steps": 30, "check_steps": 5, "target_forget_accuracy": 0.52}
    trainer = unlearned(make_vit(), low_rank_data, tmp_path, **options)
    assert (trainer.stop_reason, trainer.state.global_step) == ("target", 10)


def test_a_loss_of_retained_accuracy_is_said(
    low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(UNSCTrainer, "check", lambda t: Check(0.5, 1.0, 0.9 - 0.01 * t.state.global_step, 0.0))
    unlearned(make_vit(), low_rank_data, tmp_path / "less", max_steps=1)
    assert "held-out retained" not in caplog.text
    unlearned(make_vit(), low_rank_data, tmp_path / "more", max_steps=3)
    assert "held-out retained rows fell from 0.9 to 0.87" in caplog.text


def test_every_check_counts_changed_decisions_on_held_out_rows(known: Known, tmp_path: Path) -> None:
    with torch.no_grad():
        known.model.classifier.bias[2] += 30  # the class to forget wins everywhere, and is left out of every count
    trainer = make_trainer(known.model, known.data, tmp_path, energy=0.9, validation_fraction=0.5)
    held_out = trainer.rows.retain_held_out
    before, labels = logits(known.model, held_out), torch.as_tensor(held_out["label"][:])
    trainer.prepare_unlearning()
    start = trainer.check()
    assert (start.flips, start.negative_flips) == (0.0, 0.0)
    with torch.no_grad():
        trainer.model.classifier.bias[1] += 1000
    expected, now = count_flips(before, logits(trainer.model, held_out), labels, [2]), trainer.check()
    assert 0 < expected.negative <= expected.changed < len(held_out) == 30
    assert (now.flips, now.negative_flips) == (expected.share, expected.negative_share)
    assert now.logged()["flips"] == expected.share


def test_certificate_fails_loudly_above_the_limit(known: Known, tmp_path: Path) -> None:
    trainer = make_trainer(known.model, known.data, tmp_path, energy=0.5, learning_rate=1e-2)
    with pytest.raises(UNSCError, match="call train first"):
        trainer.certify()
    trainer.train()
    trainer.args.max_leak = 1e-6
    with pytest.raises(UNSCError, match="max_leak"):
        trainer.certify()


class Gradients(TrainerCallback):
    """Keeps what clipping, logging and the optimiser see."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _kept(space: LayerSubspace) -> torch.Tensor:
    """What the retained rows span, shape (width, rank)."""
    return space.basis[0, :, : int(space.ranks[0])].clone()


def test_gradients_are_projected_before_clipping_sees_them(low_rank_data: Data, tmp_path: Path) -> None:
    gradients = Gradients()
    trainer = make_trainer(make_vit(), low_rank_data, tmp_path, callbacks=[gradients], max_steps=1, max_grad_norm=0.0)
    plan = trainer.prepare_unlearning()  # `train` releases the bases
    kept = {layer.name: _kept(plan.subspace[layer.name]) for layer in plan.selection.layers}
    trainer.train()
    for layer in plan.selection.layers:
        assert kept[layer.name].shape[1] > 0
        gradient = layer.as_matrix(gradients.seen[layer.weight_name]).double()[0]
        assert gradient.norm() > 0
        assert (gradient @ kept[layer.name]).norm() <= 1e-5 * gradient.norm()


def test_leak_is_what_the_layers_outputs_do_on_held_out_rows(known: Known, tmp_path: Path) -> None:
    original = copy.deepcopy(known.model)
    trainer = unlearned(known.model, known.data, tmp_path, energy=0.9, learning_rate=1e-3)
    rows: dict[str, torch.Tensor] = {}
    layers = find_layers(original).layers
    with torch.no_grad(), capture_inputs(layers, lambda layer, x: rows.update({layer.name: layer.rows(x)[0]})):
        original(pixel_values=trainer.rows.retain_held_out[:]["pixel_values"])
    weights, leak = dict(known.model.named_parameters()), trainer.certify().leak_per_layer
    for layer in layers:
        if layer.name in leak:
            before = layer.as_matrix(layer.weight.detach())[0]
            change = layer.as_matrix(weights[layer.weight_name].detach())[0] - before
            measured = (rows[layer.name] @ change.T).norm() / (rows[layer.name] @ before.T).norm()
            assert leak[layer.name] == pytest.approx(float(measured), rel=1e-3)


class Tamper(TrainerCallback):
    """Moves a weight that must not move."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.vit.layernorm.bias.data += 1e-3


def test_guards_against_damage_and_silent_no_ops(low_rank_data: Data, known: Known, tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match=r"moved no weight within the budgets \(max_leak 1e-06"):
        unlearned(known.model, known.data, tmp_path, energy=0.5, max_leak=1e-6, check_steps=1)
    with pytest.raises(RuntimeError, match="a frozen weight or buffer, has changed"):
        make_trainer(make_vit(), low_rank_data, tmp_path, callbacks=[Tamper()]).train()
    with pytest.raises(UNSCError, match="learning_rate: 0.0 moved no weight"):
        make_trainer(make_vit(), low_rank_data, tmp_path, learning_rate=0.0).train()
    trainer = make_trainer(make_vit(), low_rank_data, tmp_path)
    with pytest.raises(RuntimeError, match="no pseudo-labels"):
        trainer.training_step(trainer.model, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])})


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("step", [2, 5])
def test_resumed_run_ends_at_the_same_weights(step: int, rows: bool, separable_data: Draw, tmp_path: Path) -> None:
    train = separable_data(30)
    model = learned(train)
    options: dict[str, Any] = {
        "energy": 0.9, "max_steps": 7, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 1,
        "max_leak": 0.5, "per_device_train_batch_size": 5, "objective": "unsc_retain" if rows else "scrub",
    }  # fmt: skip
    data = split_dataset(train, indices=range(0, 92, 4)) if rows else split_dataset(train, forget_classes=[2])
    if rows:  # targets that follow the model, and rehearsed rows, are found again
        unseen = with_odd_labels(separable_data(30), 60)
        options |= {"target_forget_accuracy": None, "unseen_dataset": unseen}

    def never_reached(trainer: UNSCTrainer) -> None:
        trainer.prepare_unlearning()
        trainer.goal.target = -1.0

    rest = assert_resumed_run_ends_as_a_whole_one(model, data, tmp_path, step, never_reached, **options)
    assert rest.state.global_step == 7

    def refused(what: str, network: Any = model, rows: Data = data, **changes: Any) -> None:
        with pytest.raises(UNSCError, match=f"began with {what}"):
            make_trainer(network, rows, tmp_path / "parts", **{**options, **changes}).train(resume_from_checkpoint=True)

    refused("model", make_vit(hidden_dropout_prob=0.3))
    refused("objective", objective_args={"retain_weight": 3.0})
    refused("objective", objective="gradient_difference")
    refused("forget_dataset", rows=(data.forget.select(range(20)), data.retain))


def test_controls_do_not_protect(known: Known, tmp_path: Path) -> None:
    ranks, leaks = {}, {}
    for null_space in ("retained", "random", "none"):
        options = {"null_space": null_space, "energy": 0.95, "check_steps": 100}
        trainer = unlearned(copy.deepcopy(known.model), known.data, tmp_path, callbacks=[KeepGoing()], **options)
        ranks[null_space] = [row.rank for row in trainer.plan.subspace.report()]
        leaks[null_space] = trainer.held_out_leak().total
    assert ranks["retained"] == ranks["random"]
    assert leaks["retained"] < 0.5 * min(leaks["random"], leaks["none"])


@pytest.mark.slow
def test_shirt_is_forgotten_on_fashion_mnist(shared_folder: Path, tmp_path: Path) -> None:
    data = load_image_dataset(str(shared_folder / "data" / "fashion_mnist"), cache_dir=str(tmp_path / "cache"))
    train, test_rows = data["train"].select(range(0, 60_000, 10)), data["test"].select(range(0, 10_000, 4))
    test = split_dataset(test_rows, forget_classes=["Shirt"])
    folder = shared_folder / "models" / "fashion_mnist_vit" / "original-seed0"
    trainer = UNSCTrainer(
        str(folder), quiet_config(tmp_path / "out"),
        *split_dataset(train, forget_classes=["Shirt"]), eval_dataset=test._asdict(),
        processing_class=AutoImageProcessor.from_pretrained(folder),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert trainer.stop_reason == "target"
    assert after["eval_forget_accuracy"] <= 0.01 < before["eval_forget_accuracy"]
    assert after["eval_retain_accuracy"] >= before["eval_retain_accuracy"]
    assert trainer.certify().leak <= 0.05


def test_card_without_a_comparison(low_rank_data: Data, tmp_path: Path) -> None:
    trainer = unlearned(make_vit(), low_rank_data, tmp_path / "out", learning_rate=1e-3)
    trainer.create_model_card(model_name="tiny")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Certificate" in text
    assert str(tmp_path) not in text


def test_weight_hash_notices_one_bit() -> None:
    model = make_vit()
    before = weight_hash(model)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    assert weight_hash(model) != before


@pytest.mark.parametrize(("doubling", "steps", "factor"), [(4, 8, 4), (None, 4, 1)])
def test_learning_rate_doubles_until_the_end(
    doubling: int | None, steps: int, factor: int, low_rank_data: Data, tmp_path: Path
) -> None:
    options = {"lr_doubling_steps": doubling, "max_steps": steps, "check_steps": 100}
    trainer = unlearned(make_vit(), low_rank_data, tmp_path, callbacks=[KeepGoing()], **options)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(factor * trainer.args.learning_rate)
