"""Ways of sharding that the projection does not support are refused in one line; those of `recipes` are accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers.models import make_vit
from helpers.training import GOOD

from unsc_hf import UNSCConfig, UNSCError
from unsc_hf.trainer.sharding import check_fsdp
from unsc_hf.utils.distributed import process, set_trained, units_to_shard

FILES = sorted((Path(__file__).parents[2] / "recipes" / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("fsdp_version", 1, "fsdp_version.*set it to 2"),
        ("cpu_ram_efficient_loading", True, "fsdp_cpu_ram_efficient_loading.*set it to false"),
        ("activation_checkpointing", True, "fsdp_activation_checkpointing.*--activation_checkpointing"),
        ("state_dict_type", "SHARDED_STATE_DICT", "fsdp_state_dict_type.*FULL_STATE_DICT"),
        ("mixed_precision_policy", SimpleNamespace(param_dtype=torch.bfloat16), "mixed_precision.*'no'"),
    ],
)
def test_ways_of_sharding_that_break_the_promise(option: str, value: object, message: str, tmp_path: Path) -> None:
    config = UNSCConfig(output_dir=str(tmp_path))
    check_fsdp(SimpleNamespace(**GOOD), config)
    with pytest.raises(UNSCError, match=message):
        check_fsdp(SimpleNamespace(**{**GOOD, option: value}), config)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_the_launcher_reads_it(file: Path) -> None:
    assert load_config_from_file(str(file)).num_processes >= 1


def test_the_trainer_accepts_sharding_as_configured() -> None:
    given = yaml.safe_load((FILES[0].parent / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    plugin = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    plugin |= {"fsdp_version": given["fsdp_version"], "mixed_precision_policy": None}
    check_fsdp(SimpleNamespace(**plugin), UNSCConfig(output_dir="unused"))


def test_sharding_beside_half_precision_or_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match="fsdp.*half precision"):
        UNSCConfig(output_dir=str(tmp_path), fsdp=True, bf16=True, use_cpu=True)
    with pytest.raises(UNSCError, match="second, whole model"):
        check_fsdp(SimpleNamespace(**GOOD), UNSCConfig(output_dir=str(tmp_path), objective="scrub"))


def test_alone() -> None:
    assert process() == (0, 1)
    model = make_vit()
    set_trained(model, {"classifier.weight"})
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["classifier.weight"]


def test_what_is_gathered_at_a_time_leaves_out_the_module_around_the_embedding() -> None:
    assert units_to_shard(make_vit()) == ["ViTLayer"]
