"""Ways to rehearse retained rows that a model knows by heart, and that would teach it nothing as they are.

They can be read with dropout, or mixed with each other and compared with the original model's answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import UNSCError
from ..models.hooks import set_modes


def check_dropout(model: nn.Module, activation_checkpointing: bool) -> None:
    """Refuse `retain_dropout` with a UNSCError where nothing is dropped, or with activation checkpointing."""
    if not has_dropout(model):
        raise UNSCError(
            f"retain_dropout: {type(model).__name__} has no dropout, all its rates are 0; set one in its config before "
            "the model is made, such as hidden_dropout_prob, or leave it off."
        )
    if activation_checkpointing or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise UNSCError(
            "retain_dropout: not supported with activation checkpointing, which would run layers again with dropout "
            "off; leave one of them off."
        )


@contextmanager
def dropout_mode(model: nn.Module) -> Iterator[None]:
    """Dropout as in training inside the block, batch norm on its running statistics; all modes are restored."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    try:
        yield
    finally:
        set_modes(modes)


def has_dropout(model: nn.Module) -> bool:
    """Whether anything is dropped in training: modules have a rate, and so does the configuration of attention."""

    def rates(config: object) -> Iterator[Any]:
        for name, value in vars(config).items():
            if isinstance(value, PretrainedConfig):  # of a tower
                yield from rates(value)
            elif "drop" in name and not isinstance(value, bool):
                yield value

    known = [getattr(m, "p", 0.0) for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    config = getattr(model, "config", None)
    known += rates(config) if isinstance(config, PretrainedConfig) else []
    return any(isinstance(rate, int | float) and rate > 0 for rate in known)


def mix(inputs: Mapping[str, Tensor], share: float, special: Tensor) -> dict[str, Tensor]:
    """Rows (rows, ...) with a `share` of each, in [0, 1], taken from other rows of the batch.

    Every token of a text (`input_ids`) is replaced with this chance by one drawn from the batch, except padding and
    `special` tokens. Every value of another input, such as pixels, is blended with that of another row at this weight
    (mixup, Zhang et al., arXiv 1710.09412). Draws come from torch's generator of the device, which checkpoints keep.
    """
    mixed = dict(inputs)
    ids = inputs.get("input_ids")
    if ids is not None:
        ordinary = ~torch.isin(ids, special.to(ids.device))
        if "attention_mask" in inputs:
            ordinary &= inputs["attention_mask"].bool()
        drawn = ids[ordinary]
        if len(drawn):
            others = drawn[torch.randint(len(drawn), ids.shape, device=ids.device)]
            mixed["input_ids"] = others.where(ordinary & (torch.rand(ids.shape, device=ids.device) < share), ids)
    else:
        partner: Tensor | None = None
        for name, value in inputs.items():
            if value.is_floating_point():
                partner = torch.randperm(len(value), device=value.device) if partner is None else partner
                mixed[name] = torch.lerp(value, value[partner], share)
    return mixed


def special_tokens(processing_class: Any, config: object) -> Tensor:
    """Ids of the tokens that structure a text, (ids,): the tokenizer's, else those that the configuration names."""
    ids = getattr(processing_class, "all_special_ids", None)
    if ids is None:
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
        values = [getattr(config, name, None) for name in names]
        ids = [i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None]
    return torch.tensor(sorted(set(ids)), dtype=torch.long)
