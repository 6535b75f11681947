"""What is on the disk after a kill: nothing half-written is believed, nothing of somebody else's is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from helpers.models import make_vit
from helpers.training import make_trainer
from peft import LoraConfig

from unsc_hf import UNSCError
from unsc_hf.reporting.hub import public_files
from unsc_hf.reporting.run_folder import UNFINISHED, check_output_folder, finish, move_model

Data = tuple[Dataset, Dataset]


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
    adapters = make_trainer(make_vit(), low_rank_data, tmp_path / "b", trainer_kwargs={"peft_config": LoraConfig(r=2)})
    move_model(adapters, out)
    assert {p.name for p in out.iterdir()} == {UNFINISHED, "adapter_config.json", "adapter_model.safetensors", "my.log"}
    finish(out, {"verdict": "suppressed"})
    with pytest.raises(UNSCError, match="finished run"):
        check_output_folder(out)
