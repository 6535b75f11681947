"""LoRA adapters: which configurations keep the promise, and how they are added."""

from __future__ import annotations

import copy

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import UNSCError
from .layers import find_layers, plain_name
from .outputs import find_head


def check_lora_config(config: PeftConfig) -> LoraConfig:
    """The config, if an adapter made by it can keep the promise; UNSCError names the option that breaks it, and why."""
    if not isinstance(config, LoraConfig):
        raise UNSCError(f"peft_config: got {type(config).__name__}; only LoraConfig can be confined to a null space.")
    reasons = {
        "use_dora": (config.use_dora, "DoRA rescales the whole weight, so retained outputs change"),
        "lora_bias": (config.lora_bias, "a bias changes every output"),
        "bias": (config.bias != "none", "trained biases change every output; use bias='none'"),
        "modules_to_save": (bool(config.modules_to_save), "those modules would be trained without projection"),
        "trainable_token_indices": (bool(config.trainable_token_indices), "embeddings cannot be projected"),
        "layer_replication": (bool(config.layer_replication), "it changes the base model"),
        "init_lora_weights": (
            config.init_lora_weights not in (True, False, "gaussian"),
            "it changes the base weights; A is started in the null space anyway, so leave it out",
        ),
    }
    for option, (given, reason) in reasons.items():
        if given:
            raise UNSCError(f"peft_config: {option}={getattr(config, option)!r} breaks the promise: {reason}.")
    return config


def add_adapters(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Wrap a model with LoRA adapters whose B is zero.

    `target_modules=None` means every linear layer but the head. In a model without linear layers (a ResNet) it means
    every convolution that is not grouped. UNSCError for an option that breaks the promise, or targets that match
    nothing.
    """
    config = copy.deepcopy(check_lora_config(config))
    if config.target_modules is None:
        _choose_targets(model, config)
    targets = config.target_modules
    if targets != "all-linear":
        try:
            find_layers(model, targets if isinstance(targets, str) else sorted(targets))
        except UNSCError as error:
            raise UNSCError(f"peft_config: {error}") from None
    config.init_lora_weights = True
    adapted = get_peft_model(model, config)
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and getattr(module.get_base_layer(), "groups", 1) > 1:
            raise UNSCError(
                f"peft_config: {plain_name(name)!r} is a grouped convolution; leave it out of target_modules."
            )
    return adapted


def _choose_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    config.target_modules = "all-linear"
    if model.get_output_embeddings() is not None:
        return  # PEFT leaves out the head of a language model by itself
    head, _ = find_head(model, model.config.num_labels)
    config.exclude_modules = config.exclude_modules or [head]
    layers = [layer for layer in find_layers(model).layers if layer.name != head]
    if layers and all(isinstance(layer.module, nn.Conv2d) for layer in layers):
        config.target_modules = [layer.name for layer in layers if layer.geometry.groups == 1]
