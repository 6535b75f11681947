"""A comparison is not continued with another model, and does not wait for files that nobody makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import make_vit

from unsc_hf import UNSCError
from unsc_hf.comparison.experiment import identity
from unsc_hf.comparison.parallel import Job, share


def test_models_of_one_name_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    model = make_vit()
    for place in ("a", "b"):
        model.save_pretrained(tmp_path / place / "checkpoint-5")
    same = [identity(str(tmp_path / place / "checkpoint-5")) for place in ("a", "b")]
    assert same[0] == same[1]
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "b" / "checkpoint-5")
    assert identity(str(tmp_path / "b" / "checkpoint-5")) != same[0]


@pytest.mark.timeout(60)
def test_a_job_that_no_process_knows_is_named(tmp_path: Path) -> None:
    job = Job("unsc-0", tmp_path / "never.json", lambda: None)
    with pytest.raises(UNSCError, match="^jobs: no process made 'unsc-0'"):
        list(share([job], list, 1))  # `list` makes no job at all
