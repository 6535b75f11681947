"""Saved models that older releases read the same: transformers from 4.45 and peft from 0.13, of autumn 2024."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..utils.files import write_text

# Options of adapters that peft 0.13 knows. It refuses any other, even one that changes nothing.
_KNOWN = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "use_dora", "layer_replication",
)  # fmt: skip


def write_for_older_releases(folder: str | Path) -> None:
    """Amend the configs that were saved in a folder; newer releases read them as before.

    - Rotary embeddings: `rope_theta` and `rope_scaling` beside `rope_parameters`. An older release would take its own
      default in their place, and the model would answer otherwise without a word.
    - The tokenizer's class has the name that both know.
    - Options of an adapter that have their default, and that peft 0.13 does not know, are left out.

    A model whose layers differ in their rotary embeddings stays as it is, for older releases do not know it.
    """
    amendments = {
        "config.json": _rotary, "tokenizer_config.json": _tokenizer_class, "adapter_config.json": _known_options,
    }  # fmt: skip
    for name, amend in amendments.items():
        _amend(Path(folder, name), amend)


def _amend(file: Path, amend: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        after = amend(before)
        if after != before:
            write_text(file, json.dumps(after, indent=2, ensure_ascii=False) + "\n")


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return config
    own = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return {**config, **own, "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope}


def _tokenizer_class(config: dict[str, Any]) -> dict[str, Any]:
    named = config.get("tokenizer_class")
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast"} if named == "TokenizersBackend" else config


def _known_options(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("peft_type") != "LORA":
        return config
    plain = LoraConfig()
    same = {f.name for f in fields(plain) if config.get(f.name) == getattr(plain, f.name)} | {"peft_version"}
    return {name: value for name, value in config.items() if name in _KNOWN or name not in same}
