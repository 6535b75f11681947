"""What is kept: decisions within their budget, an exact bound on rows of its own, and exactness or a refusal."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import logits, make_vit, relative
from helpers.rows import Data, random_rows
from helpers.training import Known, make_trainer, network_of, unlearned
from peft import LoraConfig

from unsc_hf import UNSCError, split_dataset
from unsc_hf.evaluation.flips import upper_bound
from unsc_hf.models.outputs import one_per_sample
from unsc_hf.trainer.checks import Check


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-1, 1.0])
def test_energy_one_keeps_logits_or_refuses(
    rate: float, optim: str, adapters: bool, exact_data: Data, tmp_path: Path
) -> None:
    model = make_vit(labels=10)
    with torch.no_grad():
        model.classifier.bias[2] = 20.0  # far from forgotten, so that no step is the last
    before = logits(model, exact_data[1])
    parts = {"peft_config": LoraConfig(r=4)} if adapters else {}
    trainer = make_trainer(
        model, exact_data, tmp_path, learning_rate=rate, optim=optim, weight_decay=0.1 * (optim != "sgd"),
        max_steps=12, check_steps=100, **parts,
    )  # fmt: skip
    trainer.train()
    drift = relative(logits(network_of(trainer), exact_data[1]), before)
    assert trainer.plan.projection.relative_change() <= 1.0 + 1e-6
    if drift > 2e-5:  # the limit is 1e-5 of other rows
        with pytest.raises(UNSCError, match="their drift is"):
            trainer.certify()
    elif drift < 5e-6:
        assert trainer.certify().drift.relative < 1e-4


def test_energy_one_refuses_logits_that_drifted(exact_data: Data, tmp_path: Path) -> None:
    """The leak sees nothing of it: every trained layer is where it was, and logits are not."""
    trainer = unlearned(make_vit(labels=10), exact_data, tmp_path, learning_rate=1e-4, check_steps=100)
    assert trainer.certify().leak < 1e-6
    with torch.no_grad():
        network_of(trainer).classifier.bias.add_(1e-3)
    with pytest.raises(UNSCError, match=r"energy: 1\.0 should keep the logits of retained rows, and their drift is"):
        trainer.certify()


def test_the_pull_back_weakens_as_the_rate_rises(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unsc_hf.nullspace.projection import NullSpaceProjection

    decays: list[float] = []
    project = NullSpaceProjection.project_displacements

    def noted(self: NullSpaceProjection, dtype: Any = None, decay: float = 0.0) -> None:
        if dtype is None:
            decays.append(decay)
        project(self, dtype, decay)

    monkeypatch.setattr(NullSpaceProjection, "project_displacements", noted)
    options = {"energy": 0.9, "max_steps": 5, "learning_rate": 1e-6, "check_steps": 100, "displacement_decay": 0.4}
    unlearned(copy.deepcopy(known.model), known.data, tmp_path, lr_doubling_steps=2, **options)
    assert decays == pytest.approx([0.4 / 2 ** (step / 2) for step in range(5)])
    decays.clear()
    unlearned(known.model, known.data, tmp_path, lr_scheduler_type="linear", **options)
    assert decays == [0.4] * 5  # a rate that falls does not make it stronger


def test_a_run_ends_within_the_budget_of_changed_decisions(known: Known, tmp_path: Path) -> None:
    """The state before the first one beyond the budget is what is left."""
    trainer = make_trainer(known.model, known.data, tmp_path, energy=0.9, max_steps=9, check_steps=3, max_flips=0.7)
    plan, real = trainer.prepare_unlearning(), trainer.check
    states: list[dict[str, torch.Tensor]] = []

    def check() -> Check:
        states.append(plan.projection.snapshot())
        return replace(real(), flips=(0.0, 0.7, 0.8)[len(states) - 1], forget_accuracy=1.0)

    trainer.check = check  # type: ignore[method-assign]
    trainer.train()
    assert trainer.stop_reason == "flips_budget"
    assert trainer.state.global_step == 6
    for layer in plan.projection.layers:
        torch.testing.assert_close(layer.weight.detach(), states[1][layer.name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(states[1][layer.name], states[2][layer.name])


def test_certify_refuses_beyond_the_budget(known: Known, tmp_path: Path) -> None:
    """A small leak says nothing where most decisions changed."""
    trainer = unlearned(known.model, known.data, tmp_path, energy=0.9)
    trainer.args.max_flips = 0.7
    with torch.no_grad():
        network_of(trainer).classifier.weight.neg_()
        network_of(trainer).classifier.bias.neg_()
    with pytest.raises(UNSCError, match=r"max_flips: \d+ of \d+ decisions on kept rows changed"):
        trainer.certify()


def test_the_certificate_reads_rows_of_its_own(known: Known, tmp_path: Path) -> None:
    model, _, (forget, retain) = known
    held, kept = retain.select(range(0, len(retain), 3)), retain.select([i for i in range(len(retain)) if i % 3])
    trainer = make_trainer(model, (forget, kept), tmp_path, trainer_kwargs={"certificate_dataset": held}, energy=0.9)
    before = logits(model, held).clone()
    trainer.train()
    after = logits(network_of(trainer), held)
    certificate = trainer.certify()
    flips = int((before[:, :2].argmax(1) != after[:, :2].argmax(1)).sum())
    assert (certificate.rows, certificate.flips) == (len(held), flips)
    assert certificate.upper_95 == upper_bound(flips, len(held))
    assert certificate.drift.relative == pytest.approx(relative(after, before), rel=1e-4)
    assert certificate.network_leak is not None
    assert certificate.amplification == certificate.network_leak / certificate.leak


def test_rows_are_held_out_for_checks_and_certificate(known: Known, tmp_path: Path) -> None:
    rows = make_trainer(known.model, known.data, tmp_path, validation_fraction=0.2).rows
    parts = [rows.retain, rows.retain_held_out, rows.certificate]
    images = [{bytes(row.numpy().tobytes()) for row in part[:]["pixel_values"]} for part in parts]
    assert all(images)
    assert sum(map(len, images)) == len(known.data.retain)
    assert len(set.union(*images)) == len(known.data.retain)


def test_the_leak_inside_the_network_is_what_its_layers_do(known: Known, tmp_path: Path) -> None:
    """One layer alone has inputs that do not move, so both leaks agree where rows are the same."""
    trainer = unlearned(
        known.model, known.data, tmp_path, energy=0.5, learning_rate=1e-3, target_modules=["classifier"]
    )
    certificate, layer = trainer.certify(), network_of(trainer).classifier
    now, (start,) = layer.weight.detach().clone(), trainer.plan.projection._start.values()
    rows: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, args: rows.append(args[0]))
    logits(network_of(trainer), trainer.rows.certificate)
    handle.remove()
    change = (rows[0] @ (now - start).T).norm() / (rows[0] @ start.T + layer.bias).norm()
    assert certificate.network_leak == pytest.approx(float(change), rel=1e-3)
    assert torch.equal(layer.weight, now)


def test_too_few_rows_say_little(low_rank_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forget, retain = low_rank_data
    trainer = unlearned(make_vit(), (forget, retain), tmp_path, validation_fraction=0.05)
    trainer.certify()
    assert "rows can show no less than" in caplog.text


@pytest.mark.parametrize(("stated", "grown", "steps"), [(None, 4, 4), (0.01, 4, 2), (None, 35, 36)])
def test_a_class_is_gone_when_its_rows_are_given_it_rarely(
    stated: float | None, grown: int, steps: int, known: Known, tmp_path: Path
) -> None:
    """Accuracy is at the target from the first check on; without a stated target the loss must have grown too.

    That accuracy cannot fall further, while the loss still rises, is no plateau.
    """
    options = {"energy": 0.9, "max_steps": 40, "check_steps": 2, "target_forget_accuracy": stated}
    trainer = make_trainer(known.model, known.data, tmp_path, **options)
    real = trainer.check
    trainer.check = lambda: replace(  # type: ignore[method-assign]
        real(), forget_accuracy=0.0, forget_loss=2.9 if trainer.state.global_step < grown else 3.1
    )
    trainer.train()
    assert (trainer.stop_reason, trainer.state.global_step) == ("target", steps)


def test_one_class_that_is_still_known_keeps_a_run_going(tmp_path: Path) -> None:
    """Of two classes one is gone at once; the mean loss of both would end the run."""
    data = split_dataset(random_rows(40, classes=4), forget_classes=[0, 1])
    trainer = make_trainer(make_vit(labels=4), data, tmp_path, energy=0.9)
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.zeros(4, 4)
    logits[:2, 0], logits[2:, 1] = -20.0, -1.0
    measured = trainer.task.measure(iter([one_per_sample(logits, labels)]))
    apart = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert measured.loss == pytest.approx(float(apart[2]))
    assert float(apart.mean()) > 3.0 > measured.loss
