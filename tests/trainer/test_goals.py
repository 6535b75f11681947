"""What checks say of kept rows: changed decisions, from the first check on."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.models import logits
from helpers.training import Known, make_trainer

from unsc_hf.evaluation.flips import count_flips


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
