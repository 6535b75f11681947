"""Objectives of published baselines on outputs that are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unsc_hf.objectives import OBJECTIVES, Terms


def _terms(**more: Any) -> Terms:
    rows = torch.randn(6, 4, requires_grad=True)
    return Terms(rows, torch.randint(4, (6,)), torch.randint(4, (6,)), torch.arange(6), torch.zeros(6), **more)


def test_fine_tuning_does_not_look_at_forget_rows() -> None:
    kept = torch.randn((), requires_grad=True)
    terms = _terms(retain_loss=kept)
    OBJECTIVES["fine_tune"].loss(terms).backward()
    assert terms.logits.grad is None
    assert float(kept.grad) == 1.0


def test_scrub_is_the_retained_loss_where_model_and_original_agree_and_falls_as_they_part_on_forget_rows() -> None:
    kept = torch.randn(5, 4)
    shared = {"retain_loss": torch.tensor(0.7), "retain_logits": kept, "retain_teacher": kept.clone()}
    terms = _terms(**shared)
    agreed = Terms(**{**vars(terms), "teacher": terms.logits.detach()})
    assert float(OBJECTIVES["scrub"].loss(agreed)) == pytest.approx(0.7, abs=1e-5)
    apart = Terms(**{**vars(terms), "teacher": terms.logits.detach() + 3 * torch.randn(6, 4)})
    assert float(OBJECTIVES["scrub"].loss(apart)) < 0.7
    moved = Terms(**{**vars(agreed), "retain_logits": kept + 3 * torch.randn(5, 4)})
    assert float(OBJECTIVES["scrub"].loss(moved)) > 0.7
