"""Retained rows that are rehearsed with dropout: rows that a model knows by heart have no loss, and teach it nothing without."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from .config import UNSCConfig
from .errors import UNSCError
from .objectives import OBJECTIVES

logger = logging.getLogger(__name__)


def check_dropout(model: nn.Module, args: UNSCConfig) -> None:
    """Refuse or name what `retain_dropout` cannot do.

    Raises:
        UNSCError: a model without dropout, or activation checkpointing.
    """
    if not OBJECTIVES[args.objective].retain:  # of several objectives of one command some do
        logger.warning(
            "retain_dropout: objective %r rehearses no retained rows, so it changes nothing.", args.objective
        )
        return
    if not has_dropout(model):
        raise UNSCError(
            f"retain_dropout: {type(model).__name__} has no dropout, all its rates are 0; set one in its config before the model is "
            "made, such as hidden_dropout_prob, or leave it off."
        )
    if args.activation_checkpointing or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise UNSCError(
            "retain_dropout: not supported with activation checkpointing, which would run layers again with dropout off; leave one "
            "of them off."
        )


@contextmanager
def dropout_mode(model: nn.Module) -> Iterator[None]:
    """Dropout as in training inside the block, batch norm on its running statistics; every module's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def has_dropout(model: nn.Module) -> bool:
    """Whether anything is dropped in training: a module with a rate, or a rate in the model's configuration (attention reads it there)."""

    def rates(config: object) -> Iterator[Any]:
        for name, value in vars(config).items():
            if isinstance(value, PretrainedConfig):  # of a tower
                yield from rates(value)
            elif "drop" in name and not isinstance(value, bool):
                yield value

    found = [getattr(m, "p", 0.0) for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    config = getattr(model, "config", None)
    found += rates(config) if isinstance(config, PretrainedConfig) else []
    return any(isinstance(rate, int | float) and rate > 0 for rate in found)
