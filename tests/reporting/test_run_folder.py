"""What is on the disk after a kill: nothing half-written is believed, nothing of somebody else's is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.failpoints import Killed, stopped_at
from helpers.models import make_vit
from helpers.rows import Data
from helpers.training import make_trainer
from peft import LoraConfig

from unsc_hf import UNSCError
from unsc_hf.reporting.hub import public_files
from unsc_hf.reporting.run_folder import RESULTS, UNFINISHED, check_output_folder, finish, move_model


def test_an_unfinished_folder_is_written_over_whatever_it_held(low_rank_data: Data, tmp_path: Path) -> None:
    """Full weights killed on the way, then adapters into the same folder: the full weights must not stay."""
    out = tmp_path / "result"
    move_model(make_trainer(make_vit(), low_rank_data, tmp_path / "a"), out)
    assert (out / "model.safetensors").is_file()
    check_output_folder(out)
    (out / "README.md").write_text("of the first try")
    (out / "my.log").write_text("somebody's")
    with pytest.raises(UNSCError, match="interrupted run"):
        public_files(out)
    adapters = make_trainer(make_vit(), low_rank_data, tmp_path / "b", peft_config=LoraConfig(r=2))
    move_model(adapters, out)
    assert {p.name for p in out.iterdir()} == {UNFINISHED, "adapter_config.json", "adapter_model.safetensors", "my.log"}
    finish(out, {"verdict": "suppressed"})
    with pytest.raises(UNSCError, match="finished run"):
        check_output_folder(out)


def test_a_result_killed_at_any_write_is_unfinished_or_whole(low_rank_data: Data, tmp_path: Path) -> None:
    trainer = make_trainer(make_vit(), low_rank_data, tmp_path / "a")
    files = {"config.json", "model.safetensors", RESULTS}

    def save(out: Path, event: int) -> int:
        with stopped_at(event, out) as failpoint:
            move_model(trainer, out)
            finish(out, {"verdict": "suppressed"})
        return failpoint.events

    for event in range(save(tmp_path / "whole", -1)):
        out = tmp_path / str(event)
        with pytest.raises(Killed):
            save(out, event)
        written = {file.name for file in out.iterdir() if file.is_file()} if out.exists() else set()
        if UNFINISHED not in written:
            assert not files & written or files <= written, event
        if RESULTS not in written:
            check_output_folder(out)  # the same command may be started again
            save(out, -1)
        assert files <= {file.name for file in out.iterdir()}
