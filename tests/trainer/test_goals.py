"""What checks say of kept rows: changed decisions, from the first check on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from helpers.models import learned
from helpers.training import logits, make_trainer

from unsc_hf import split_dataset
from unsc_hf.evaluation.flips import count_flips


def test_every_check_counts_changed_decisions_on_held_out_rows(
    separable_data: Callable[[int], Dataset], tmp_path: Path
) -> None:
    train = separable_data(40)
    model = learned(train)
    data = split_dataset(train, forget_classes=["frog"])
    trainer = make_trainer(model, data, tmp_path, energy=0.3, max_steps=30, learning_rate=1e-2, validation_fraction=0.5)
    held_out = trainer.rows.retain_held_out
    before, labels = logits(model, held_out), torch.as_tensor(held_out["label"][:])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "leak" in entry]
    assert (history[0]["flips"], history[0]["negative_flips"]) == (0.0, 0.0)
    expected = count_flips(before, logits(trainer.model, held_out), labels, [2])
    assert history[-1]["flips"] == expected.share
    assert history[-1]["negative_flips"] == expected.negative_share
    assert len(held_out) == 40
