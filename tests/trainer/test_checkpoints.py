"""What a run may be resumed from."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.failpoints import Killed, stopped_at
from helpers.models import copied, make_vit
from helpers.rows import Data
from helpers.training import Known, make_trainer, unlearned
from safetensors.torch import load_file

from unsc_hf import UNSCError
from unsc_hf.trainer.checkpoints import find_checkpoint, mark_checkpoint


def test_the_last_whole_checkpoint_is_found_and_the_others_are_left_alone(tmp_path: Path) -> None:
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint(True, tmp_path / "nowhere") is None
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"somebody's")
    mark_checkpoint(tmp_path / "checkpoint-5", {"model": "a"})
    mark_checkpoint(tmp_path / "checkpoint-10", {"model": "a"})
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-10")
    assert (tmp_path / "checkpoint-100" / "model.safetensors").is_file()
    assert find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path) == str(tmp_path / "checkpoint-5")
    with pytest.raises(UNSCError, match="not to its end"):
        find_checkpoint(str(tmp_path / "checkpoint-100"), tmp_path)


def test_a_run_that_stopped_where_it_was_to_save_can_be_resumed(known: Known, tmp_path: Path) -> None:
    """The state in which it stopped is no checkpoint: resumed from there it would go on past its end."""
    ends = []
    for resume in (False, True):
        trainer = make_trainer(
            copy.deepcopy(known.model), known.data, tmp_path, energy=0.9, max_steps=60, learning_rate=1e-3,
            check_steps=2, save_strategy="steps", save_steps=2, target_forget_accuracy=0.3,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.stop_reason == "target"
        ends.append((trainer.state.global_step, copied(trainer.model.named_parameters())))
        last = find_checkpoint(True, trainer.args.output_dir)
        assert int(last.rsplit("-", 1)[1]) < ends[-1][0]
    assert ends[0][0] == ends[1][0] > 2
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_a_checkpoint_killed_at_any_write_is_whole_or_not_found(low_rank_data: Data, tmp_path: Path) -> None:
    """Both a new one and one that replaces another: what is found holds one state, never parts of two."""
    trainer = unlearned(make_vit(), low_rank_data, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint-1"
    weights = trainer.model.vit.layernorm.bias

    def save(value: float, event: int) -> int:
        with torch.no_grad():
            weights.fill_(value)
        trainer.state.global_step, trainer.state.epoch = 1, value
        with stopped_at(event, tmp_path) as failpoint:
            trainer._save_checkpoint(trainer.model, None)
        return failpoint.events

    events = save(1.0, -1)
    assert events > 5
    for before in (False, True):
        for event in range(events):
            shutil.rmtree(folder, ignore_errors=True)
            if before:
                save(1.0, -1)
            with pytest.raises(Killed):
                save(2.0, event)
            if find_checkpoint(True, trainer.args.output_dir) is not None:
                epoch = json.loads((folder / "trainer_state.json").read_text())["epoch"]
                stored = load_file(folder / "model.safetensors")["vit.layernorm.bias"]
                assert (stored == epoch).all(), event
                assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {file.name for file in folder.iterdir()}
