"""Retained rows that are rehearsed. Those that a model knows by heart have no loss and teach it nothing as they are: they can be read
with dropout, or mixed with each other and held against the original model's answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..config import UNSCConfig
from ..errors import UNSCError
from ..models.hooks import NOT_INPUTS
from ..objectives import OBJECTIVES
from ..tasks.causal_lm import CausalLMTask
from ..tasks.classification import ClassificationTask

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


def check_mixing(args: UNSCConfig) -> None:
    """Name a `retain_mixing` that was asked for and changes nothing."""
    if args.retain_mixing != UNSCConfig.retain_mixing and not OBJECTIVES[args.objective].mixed:
        mixing = [name for name, objective in OBJECTIVES.items() if objective.mixed]
        logger.warning(
            "retain_mixing: objective %r mixes no rows, so it changes nothing; %s does.",
            args.objective,
            ", ".join(mixing),
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


def rehearse(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    task: ClassificationTask | CausalLMTask,
    args: UNSCConfig,
    original: nn.Module | None,
    special: Tensor,
) -> dict[str, Tensor]:
    """What an objective reads of a batch of retained rows, by the names in `Terms`.

    Args:
        original: the model as it was, for objectives that compare with it.
        special: ids of tokens that are never exchanged; see `special_tokens`.
    """
    objective = OBJECTIVES[args.objective]
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    if objective.mixed and args.retain_mixing > 0:
        inputs = mix(inputs, args.retain_mixing, special)
    with dropout_mode(model) if args.retain_dropout else nullcontext():
        kept = task.outputs(task.logits(model, inputs), batch["labels"])
    found = {
        "retain_logits": kept.logits,
        "retain_loss": nn.functional.cross_entropy(kept.logits.float(), kept.labels),
    }
    if objective.retain_teacher:
        assert original is not None
        with torch.no_grad():
            found["retain_teacher"] = task.outputs(task.logits(original, inputs), batch["labels"]).logits
    return found


def mix(inputs: Mapping[str, Tensor], share: float, special: Tensor) -> dict[str, Tensor]:
    """Rows with a share of each taken from other rows of the batch.

    Of texts (`input_ids`) every token is exchanged with this chance for one drawn from the batch, but for padding and `special` ones; of
    other inputs, such as pixels, every value is blended with that of another row at this weight (mixup, Zhang et al., arXiv 1710.09412).
    Draws come from torch's generator of the device, which checkpoints keep.

    Args:
        inputs: what the model reads, (rows, ...) each.
        share: in [0, 1].
        special: token ids, (ids,).
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
    """Ids of the tokens that give a text its form, of a tokenizer, or as far as the model's configuration names them, (ids,)."""
    ids = getattr(processing_class, "all_special_ids", None)
    if ids is None:
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
        found = [getattr(config, name, None) for name in names]
        ids = [i for value in found for i in (value if isinstance(value, list) else [value]) if i is not None]
    return torch.tensor(sorted(set(ids)), dtype=torch.long)
