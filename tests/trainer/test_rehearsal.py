"""Retained rows are rehearsed mixed, where that is asked for; errors say where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import make_vit
from helpers.rows import Data
from helpers.texts import NAMES, texts
from helpers.training import assert_promise, drift, make_trainer
from torch import nn

from unsc_hf import UNSCError, split_dataset
from unsc_hf.comparison.references.texts import TextPlan
from unsc_hf.experimental.rehearsal import mix, special_tokens
from unsc_hf.objectives import OBJECTIVES, Terms


@pytest.mark.parametrize(
    ("objective", "arguments", "options", "message"),
    [
        ("unsc_retain", {"retain_mixing": 0.5}, {}, "objective_args: objective 'unsc_retain' has no option 'retain_m"),
        *[("unsc_distill", {"retain_mixing": share}, {}, r"objective_args: retain_mixing=.* is outside \[0, 1\); it is")
          for share in (-0.1, 1.0, 30)],
    ],
)  # fmt: skip
def test_rehearsal_that_cannot_be_is_refused(
    objective: str, arguments: dict[str, Any], options: Any, message: str, low_rank_data: Data, tmp_path: Path
) -> None:
    make_trainer(make_vit(), low_rank_data, tmp_path, objective="unsc_distill", objective_args={"retain_mixing": 0.5})
    model = make_vit()
    with pytest.raises(UNSCError, match=f"^{message}"):
        make_trainer(model, low_rank_data, tmp_path, objective=objective, objective_args=arguments, **options)


def test_tokens_are_exchanged_for_others_of_the_batch_and_the_form_of_a_text_stays() -> None:
    ids = torch.randint(10, 500, (60, 40))
    lengths = torch.randint(3, 41, (60,))
    mask = (torch.arange(40) < lengths[:, None]).long()
    ids[:, 0], ids[torch.arange(60), lengths - 1] = 1, 2
    ids[mask == 0] = torch.randint(600, 700, (int((mask == 0).sum()),))  # padding whose id is not known to be special
    special = torch.tensor([1, 2])
    found = mix({"input_ids": ids, "attention_mask": mask}, 0.3, special)
    assert torch.equal(found["attention_mask"], mask)
    fixed = torch.isin(ids, special) | (mask == 0)
    assert torch.equal(found["input_ids"][fixed], ids[fixed])
    assert torch.isin(found["input_ids"][~fixed], ids[~fixed]).all()
    changed = (found["input_ids"] != ids)[~fixed].float()
    assert abs(float(changed.mean()) - 0.3) < 5 * (0.21 / len(changed)) ** 0.5 + 0.01  # some are drawn for themselves
    again = mix({"input_ids": ids, "attention_mask": mask}, 0.3, special)
    assert not torch.equal(found["input_ids"], again["input_ids"])
    only = {"input_ids": torch.tensor([[1, 2], [1, 2]])}
    assert torch.equal(mix(only, 0.9, special)["input_ids"], only["input_ids"])


def test_pixels_are_blended_with_those_of_one_other_row() -> None:
    pixels, more, flags = torch.randn(7, 3, 4, 4), torch.randn(7, 5), torch.ones(7, 2, dtype=torch.long)
    found = mix({"pixel_values": pixels, "more": more, "flags": flags}, 0.25, torch.tensor([]))
    other = (found["pixel_values"] - 0.75 * pixels) / 0.25
    partner = torch.cdist(other.flatten(1), pixels.flatten(1)).argmin(1)
    assert sorted(partner.tolist()) == list(range(7))
    torch.testing.assert_close(found["pixel_values"], 0.75 * pixels + 0.25 * pixels[partner])
    torch.testing.assert_close(found["more"], 0.75 * more + 0.25 * more[partner])
    assert torch.equal(found["flags"], flags)


def test_special_tokens_are_the_tokenizers_or_the_models() -> None:
    model, tokenizer = TextPlan("nano", vocabulary_size=200, max_length=16).start(texts(30), NAMES)
    expected = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    assert expected <= set(special_tokens(tokenizer, model.config).tolist())
    model.config.pad_token_id, model.config.eos_token_id = 3, [7, 9]
    assert {3, 7, 9} <= set(special_tokens(None, model.config).tolist())


def test_the_forgotten_classes_have_no_part_in_what_is_distilled() -> None:
    rows, kept = torch.randn(6, 5), torch.randn(8, 5)
    gone = torch.tensor([1, 4])
    student = kept.clone()
    student[:, gone] = -1e4
    student.requires_grad_()

    def loss(teacher: torch.Tensor, weight: float = 2.5) -> torch.Tensor:
        terms = Terms(
            rows, torch.randint(5, (6,)), torch.zeros(6, dtype=torch.long), torch.arange(6), torch.zeros(6),
            retain_logits=student, retain_teacher=teacher, forgotten=gone,
        )  # fmt: skip
        return OBJECTIVES["unsc_distill"].loss(terms, {"retain_weight": weight})

    forgetting = float(nn.functional.cross_entropy(rows, torch.zeros(6, dtype=torch.long)))
    loud = kept.clone()
    loud[:, gone] += 30 * torch.rand(8, 2)
    for teacher in (kept, loud):
        value = loss(teacher)
        assert float(value) == pytest.approx(forgetting, rel=1e-5)
        (gradient,) = torch.autograd.grad(value, student)
        assert float(gradient.abs().max()) < 1e-6
    apart = kept + torch.randn(8, 5)
    ours, theirs = (part[:, [0, 2, 3]].log_softmax(-1) for part in (student, apart))
    expected = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    assert float(loss(apart)) == pytest.approx(forgetting + 2.5 * float(expected), rel=1e-5)


def test_model_and_original_read_the_same_mixed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = texts(60)
    model, tokenizer = TextPlan("nano", vocabulary_size=200, max_length=16).start(train, NAMES)
    data = split_dataset(train, forget_classes=[0])
    trainer = make_trainer(
        model, data, tmp_path, objective="unsc_distill", max_steps=2, check_steps=100, energy=0.9,
        per_device_train_batch_size=8, processing_class=tokenizer,
    )  # fmt: skip
    trainer.prepare_unlearning()
    texts_read = {tuple(row["input_ids"]) for row in trainer.reader.prepare(train)}
    seen: list[tuple[bool, list[tuple[int, ...]], torch.Tensor]] = []
    logits = type(trainer.task).logits

    def read(task: Any, network: nn.Module, inputs: Any) -> torch.Tensor:
        found: torch.Tensor = logits(task, network, inputs)
        if torch.is_grad_enabled() or network is trainer.terms.original:
            pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ids = [tuple(row[mask.bool()].tolist()) for row, mask in pairs]
            seen.append((network is trainer.terms.original, ids, found.detach()))
        return found

    monkeypatch.setattr(type(trainer.task), "logits", read)
    gone: list[list[int]] = []
    distill = OBJECTIVES["unsc_distill"]

    def run(terms: Terms, **more: Any) -> torch.Tensor:
        gone.append(terms.forgotten.tolist())
        return distill.run(terms, **more)

    trainer.terms.objective = replace(distill, run=run)
    trainer.train()
    assert gone == [[0], [0]]
    # Of each step the forget rows, the retained ones, and these again.
    assert [by_teacher for by_teacher, _, _ in seen] == [False, False, True] * 2
    forgotten, mixed, taught = seen[:3]
    assert set(forgotten[1]) <= texts_read
    assert mixed[1] == taught[1]
    assert np.mean([row in texts_read for row in mixed[1]]) < 0.5
    form = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert all([row[0], row[-1]] == form and not set(form) & set(row[1:-1]) for row in mixed[1])
    torch.testing.assert_close(mixed[2], taught[2], atol=1e-5, rtol=1e-4)  # before the first step


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_distillation_keeps_the_promise(mixing: float, exact_data: Data, tmp_path: Path) -> None:
    options = {"objective": "unsc_distill", "objective_args": {"retain_mixing": mixing}, "learning_rate": 2e-4}
    assert_promise(drift(make_vit(labels=10), exact_data, tmp_path, **options))
