"""What a classifier says about rows: logits, the features its head reads, and the true labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .errors import UNSCError
from .layers import ProtectedLayer, RowGeometry, capture_inputs, evaluation_mode

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model on some rows, on the CPU.

    Attributes:
        logits: float32, shape (rows, labels).
        features: float32 inputs of the head, shape (rows, width), or None when not asked for.
        labels: int64, shape (rows,).
    """

    logits: Tensor
    features: Tensor | None
    labels: Tensor

    def need_features(self) -> Tensor:
        """The features; it is a programming error not to have asked for them."""
        if self.features is None:
            raise TypeError("outputs were collected without features; pass features=True.")
        return self.features


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


def collect_outputs(
    model: nn.Module,
    dataset: Any,
    collate_fn: Collator,
    *,
    features: bool = False,
    batch_size: int = 256,
    progress: bool = False,
    description: str = "Evaluating",
) -> Outputs:
    """Run `model` in eval mode over all rows of a prepared data set.

    Args:
        model: a classifier whose output has `logits` of shape (batch, labels).
        dataset: prepared rows that carry labels.
        collate_fn: makes a batch; it must contain `labels`.
        features: also keep the inputs of the head.

    Raises:
        UNSCError: rows without labels, or outputs that are not (batch, labels).
    """
    device = next(model.parameters()).device
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        generator=torch.Generator(),  # leaves the global random state alone
    )
    logits: list[Tensor] = []
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    heads: list[ProtectedLayer] = []
    if features:
        name, module = find_head(model, int(model.config.num_labels))  # type: ignore[union-attr, arg-type]
        heads = [ProtectedLayer(name, module, RowGeometry("linear", 1, module.in_features))]

    def keep(layer: ProtectedLayer, x: Tensor) -> None:
        inputs.append(layer.rows(x.detach())[0].float().cpu())

    with evaluation_mode(model), capture_inputs(heads, keep, strict=False):
        for batch in tqdm(loader, desc=description, disable=not progress, leave=False):
            if "labels" not in batch:
                raise UNSCError("label_column: the rows carry no labels; name the column that holds them.")
            labels.append(batch["labels"].cpu())
            out = model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
            if out.logits.dim() != 2:
                raise UNSCError(f"model: logits have shape {tuple(out.logits.shape)}, expected (batch, labels).")
            logits.append(out.logits.float().cpu())
    return Outputs(torch.cat(logits), torch.cat(inputs) if heads else None, torch.cat(labels))
