"""Ways to rehearse retained rows that a model knows by heart, and that would teach it nothing as they are.

They can be read with dropout, or mixed with each other and compared with the original model's answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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
