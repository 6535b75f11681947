"""`NullSpaceCallback` protects an ordinary `Trainer`: retained outputs stay, whatever the optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import copied, logits, make_vit, relative
from helpers.rows import Data
from transformers import Trainer, TrainingArguments

from unsc_hf import NullSpaceCallback, UNSCError


def train(model: Any, data: Data, folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=16, learning_rate=1e-3, use_cpu=True,
        disable_tqdm=True, report_to="none", save_strategy="no", **options,
    )  # fmt: skip
    rows = data[0].rename_column("label", "labels").add_column("note", ["unused"] * len(data[0]))
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"optim": "sgd", "optim_args": "momentum=0.9"}, {"optim": "adafactor"}]
)
def test_retained_outputs_stay(exact_data: Data, tmp_path: Path, options: dict[str, Any]) -> None:
    forget, retain = exact_data
    kept = retain.rename_column("label", "labels").add_column("note", ["unused"] * len(retain))
    model = make_vit(labels=10)
    start = copied(model.state_dict().items())
    before, before_forget = logits(model, retain), logits(model, forget)
    callback = NullSpaceCallback(kept, energy=1.0)
    train(model, exact_data, tmp_path, [callback], **options)
    assert relative(logits(model, retain), before) < 1e-5
    assert relative(logits(model, forget), before_forget) > 1e-3
    assert callback.space.leak([{"pixel_values": retain[:]["pixel_values"]}]).total < 1e-6
    for name in callback.space.frozen:
        assert torch.equal(model.state_dict()[name], start[name]), name

    model.load_state_dict(start)
    train(model.requires_grad_(True), exact_data, tmp_path, [], **options)
    assert relative(logits(model, retain), before) > 1e-3


def test_several_processes_or_no_rows_are_refused(
    exact_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UNSCError, match="batches"):
        train(make_vit(labels=10), exact_data, tmp_path, [NullSpaceCallback(exact_data[1].select([]))])
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(UNSCError, match="NullSpaceCallback: got several processes"):
        train(make_vit(labels=10), exact_data, tmp_path, [NullSpaceCallback(exact_data[1])])
