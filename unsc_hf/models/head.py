"""The output layer of a classifier, its weights, and logits computed with little padding."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import UNSCError
from ..utils.distributed import whole
from .hooks import pieces
from .layers import ADAPTER


def find_head(model: nn.Module, num_labels: int) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer that gives the logits: the last with `num_labels` outputs; UNSCError
    without."""
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_labels and ".lora_" not in name
    ]
    if not heads:
        raise UNSCError(f"model: {type(model).__name__} has no linear head with {num_labels} outputs.")
    return heads[-1]


def classify(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (batch, labels) of samples with one label each, and the order in which they ran, which hooks need,
    (batch,).

    Texts of a batch are padded to the longest, which on a CPU may double the work. There the batch runs in pieces of
    similar length, each cut after its own last token. Masked tokens have no influence, so the logits agree up to
    rounding. Several processes must run the same number of passes, so their batches are not split.
    """
    order, logits = zip(*((rows, model(**piece).logits) for rows, piece in pieces(inputs)), strict=True)
    if len(order) == 1:
        return logits[0], order[0]
    ran = torch.cat(order)
    return torch.cat(logits)[ran.argsort()], ran


def head_weights(model: nn.Module, num_labels: int) -> tuple[Tensor, Tensor | None]:
    """Weight (labels, width) and bias of the head, with the change that an adapter on it makes."""
    name, head = find_head(model, num_labels)
    weight = whole(head.weight.detach())
    owner = dict(model.named_modules()).get(name.removesuffix(".base_layer"))
    if isinstance(owner, LoraLayer):
        weight = weight + whole(owner.get_delta_weight(ADAPTER).detach())
    return weight, None if head.bias is None else whole(head.bias.detach())
