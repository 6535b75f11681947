"""What checks say of kept rows: changed decisions, from the first check on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from helpers.models import learned
from helpers.training import logits, make_trainer

from unsc_hf import split_dataset
from unsc_hf.evaluation.certificate import count_flips


def test_every_check_counts_changed_decisions_on_held_out_rows(
    separable_data: Callable[[int], Dataset], tmp_path: Path
) -> None:
    train = separable_data(40)
    model = learned(train)
    with torch.no_grad():
        model.classifier.bias[2] += 30  # the class to forget wins everywhere, and is left out of every count
    data = split_dataset(train, forget_classes=["frog"])
    trainer = make_trainer(model, data, tmp_path, energy=0.9, validation_fraction=0.5)
    held_out = trainer.rows.retain_held_out
    before, labels = logits(model, held_out), torch.as_tensor(held_out["label"][:])
    trainer.prepare_unlearning()
    start = trainer.check()
    assert (start.flips, start.negative_flips) == (0.0, 0.0)
    with torch.no_grad():
        trainer.model.classifier.bias[1] += 1000
    expected, now = count_flips(before, logits(trainer.model, held_out), labels, [2]), trainer.check()
    assert 0 < expected.negative <= expected.changed < len(held_out) == 40
    assert (now.flips, now.negative_flips) == (expected.share, expected.negative_share)
    assert now.logged()["flips"] == expected.share
