"""The launcher reads the files in `recipes/accelerate_configs`, and the trainer accepts what they ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from unsc_hf import UNSCConfig
from unsc_hf.trainer.sharding import check_fsdp

FILES = sorted((Path(__file__).parents[2] / "recipes" / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_the_launcher_reads_it(file: Path) -> None:
    assert load_config_from_file(str(file)).num_processes >= 1


def test_the_trainer_accepts_sharding_as_configured() -> None:
    given = yaml.safe_load((FILES[0].parent / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    plugin = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    check_fsdp(
        SimpleNamespace(**{**plugin, "fsdp_version": given["fsdp_version"], "mixed_precision_policy": None}),
        UNSCConfig(output_dir="unused"),
    )
