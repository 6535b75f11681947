"""`NullSpaceCallback` protects an ordinary `Trainer`: retained outputs stay, whatever the optimiser."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.language import questions
from helpers.models import copied, logits, make_vit, randomise, relative
from helpers.rows import Data
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from unsc_hf import NullSpaceCallback, UNSCError
from unsc_hf.comparison.references.texts import LanguagePlan
from unsc_hf.data.dialogues import prepare_dialogues, to_dialogues
from unsc_hf.evaluation.language.flips import token_flips


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


@pytest.mark.parametrize("rank", [None, 4])
def test_supervised_fine_tuning_with_trl_keeps_answers(rank: int | None, tmp_path: Path) -> None:
    """TRL's trainer replaces the model's forward and PEFT wraps it; kept tokens stay the most likely ones."""
    trl = pytest.importorskip("trl")  # its own dependencies are younger than the oldest that are admitted here
    new, known = (
        to_dialogues(questions(n, start)).select_columns(["prompt", "completion"]) for n, start in ((8, 50), (1, 0))
    )
    base, tokenizer = LanguagePlan(size="nano", vocabulary_size=300, max_length=64).start(new)
    kept = prepare_dialogues(known, tokenizer, completion_only=False)
    rows = [kept[i] for i in range(len(kept))]
    randomise(base)
    flips = {}
    for protected in (True, False):
        args = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=8, max_length=64,
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, report_to="none",
            save_strategy="no",
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            copy.deepcopy(base), args, train_dataset=new, processing_class=tokenizer,
            callbacks=[NullSpaceCallback(kept, energy=0.999)] if protected else [],
            peft_config=None if rank is None else LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        flips[protected] = token_flips(base, trainer.model, rows, tokenizer.pad_token_id, 8)
    assert flips[False].share > 0.2
    assert flips[True].share < flips[False].share / 4
    assert flips[True].drift < flips[False].drift / 10
