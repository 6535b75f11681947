"""The output layer of a classifier: where it is, what enters it, and its weights."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import UNSCError
from ..utils.distributed import whole
from .hooks import pieces
from .layers import ADAPTER


def find_head(model: nn.Module, num_labels: int) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that produces the logits: the last one with `num_labels` outputs.

    Raises:
        UNSCError: when the model has none.
    """
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_labels and ".lora_" not in name
    ]
    if not heads:
        raise UNSCError(f"model: {type(model).__name__} has no linear head with {num_labels} outputs.")
    return heads[-1]


def classify(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of samples with one label each, and the order in which the samples were run (for whoever watches a layer).

    Texts of a batch are padded to the longest, which on a CPU may double the work: there a batch is run in pieces of like length, each
    cut after its own last token. What is masked has no influence, so the logits are the same, to rounding. Several processes run the same
    number of passes each, so there nothing is cut.

    Args:
        model: its output has `logits`, (batch, labels).
        inputs: what it reads, (batch, ...) each.

    Returns:
        Logits (batch, labels) in the order of `inputs`, and the number of the sample that was run first, second, ..., (batch,).
    """
    found = [(rows, model(**piece).logits) for rows, piece in pieces(inputs)]
    if len(found) == 1:
        return found[0][1], found[0][0]
    order = torch.cat([rows for rows, _ in found])
    return torch.cat([logits for _, logits in found])[order.argsort()], order


def head_weights(model: nn.Module, num_labels: int) -> tuple[Tensor, Tensor | None]:
    """Weight (labels, width) and bias of the head as they act, an adapter on it included."""
    name, head = find_head(model, num_labels)
    weight = whole(head.weight.detach())
    owner = dict(model.named_modules()).get(name.removesuffix(".base_layer"))
    if isinstance(owner, LoraLayer):
        weight = weight + whole(owner.get_delta_weight(ADAPTER).detach())
    return weight, None if head.bias is None else whole(head.bias.detach())
