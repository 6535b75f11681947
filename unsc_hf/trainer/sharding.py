"""FSDP2: which ways of sharding the projection can follow, and sharding before anything is read."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from transformers import PreTrainedModel

from ..config import UNSCConfig
from ..errors import UNSCError
from ..models.layers import find_layers
from ..objectives import OBJECTIVES
from ..utils.distributed import units_to_shard


def shard_model(accelerator: Accelerator, model: PreTrainedModel, config: UNSCConfig) -> None:
    """Shard the weights now, before anything is read: nothing then needs the whole model on one device.

    Upstream shards when training begins, and finds that done.

    Raises:
        UNSCError: a way of sharding, or a layer, that the projection cannot follow.
    """
    if model.dtype != torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        raise UNSCError(f"fsdp: the model is in {dtype}; load it in float32, or use one process or DDP (torchrun).")
    plugin = accelerator.state.fsdp_plugin
    check_fsdp(plugin, config)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = units_to_shard(model)
    grouped = [layer.name for layer in find_layers(model).layers if layer.geometry.groups > 1]
    if grouped:
        raise UNSCError(
            f"fsdp: {grouped[0]!r} is a grouped convolution, whose rows cannot be sharded; use one process or DDP "
            "(torchrun)."
        )
    fsdp2_prepare_model(accelerator, model)


def check_fsdp(plugin: Any, config: UNSCConfig) -> None:
    """Refuse ways of sharding that the projection cannot follow, whether arguments or a launcher asked for them.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`.
        config: the run's options.

    Raises:
        UNSCError: names the option and what to set instead.
    """
    state_dict = str(plugin.state_dict_type)
    mixed = plugin.mixed_precision_policy
    reasons = {
        "fsdp_version": (plugin.fsdp_version != 2, "FSDP1 flattens weights into one vector; set it to 2"),
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "all but one process would start from empty weights, whose hash is not the model's; set it to false",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "it renames the layers; set it to false and use --activation_checkpointing",
        ),
        "fsdp_state_dict_type": (
            "FULL_STATE_DICT" not in state_dict,
            f"{state_dict} saves no model that from_pretrained can load; set it to FULL_STATE_DICT",
        ),
        "mixed_precision": (
            mixed is not None and mixed.param_dtype not in (None, torch.float32),
            "weights would be gathered in half precision, and statistics read through them; set it to 'no'",
        ),
    }
    for option, (given, reason) in reasons.items():
        if given:
            raise UNSCError(f"{option}: not supported with FSDP, {reason}.")
    if OBJECTIVES[config.objective].keeps_original:
        raise UNSCError(
            f"objective: {config.objective!r} keeps a second, whole model beside the sharded one; use DDP (torchrun)."
        )
