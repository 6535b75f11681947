"""New labels for the rows to forget: the most similar class that remains, as the original model sees it.

UNSC (arXiv 2404.13588, section 4.2) takes the original model's most likely class among the remaining ones. The other
strategies exist to be compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UNSCError
from .outputs import Outputs

STRATEGIES = ("top1", "soft", "second", "random", "nearest_mean")


def pseudo_labels(
    strategy: str,
    forget: Outputs,
    remaining: Sequence[int],
    *,
    retain: Outputs | None = None,
    seed: int = 0,
) -> Tensor:
    """Labels for the forget rows, never a row's own label and never a class that does not remain.

    Args:
        strategy: "top1" the most likely remaining class; "second" the second most likely; "soft" the softmax over the
            remaining classes; "random" uniform over them; "nearest_mean" the class whose mean head input over `retain`
            is nearest (Euclidean).
        forget: the original model's outputs on the forget rows, in eval mode.
        remaining: ids of the classes that still occur in the retained data.
        retain: outputs on retained rows, for "nearest_mean".
        seed: for "random".

    Returns:
        int64 ids of shape (rows,), or for "soft" a float32 distribution of shape (rows, labels).

    Raises:
        UNSCError: unknown strategy, or too few remaining classes for it.
    """
    if strategy not in STRATEGIES:
        raise UNSCError(f"pseudo_labels: {strategy!r} does not exist; choose from {', '.join(STRATEGIES)}.")
    rows, classes = forget.logits.shape
    allowed = torch.zeros(rows, classes, dtype=torch.bool)
    allowed[:, torch.as_tensor(list(remaining), dtype=torch.long)] = True
    allowed[torch.arange(rows), forget.labels] = False
    fewest = int(allowed.sum(1).min()) if rows else len(remaining)
    needed = 2 if strategy == "second" else 1
    if fewest < needed:
        raise UNSCError(
            f"pseudo_labels: {strategy!r} needs {needed} remaining classes besides a row's own, found {fewest}; keep more classes."
        )

    if strategy in ("top1", "second"):
        return _masked(forget.logits, allowed).topk(needed, dim=1).indices[:, needed - 1]
    if strategy == "soft":
        return _masked(forget.logits, allowed).softmax(1)
    if strategy == "random":
        noise = torch.rand(rows, classes, generator=torch.Generator().manual_seed(seed))
        return _masked(noise, allowed).argmax(1)
    if retain is None:
        raise UNSCError("pseudo_labels: 'nearest_mean' needs outputs on retained rows.")
    means = torch.full((classes, forget.need_features().shape[1]), torch.inf)
    for label in sorted(set(retain.labels.tolist())):
        means[label] = retain.need_features()[retain.labels == label].mean(0)
    return _masked(-torch.cdist(forget.need_features(), means), allowed).argmax(1)


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed | scores.isnan(), -torch.inf)


def sparse(distribution: Tensor, tokens: int) -> Tensor:
    """The `tokens` largest shares of each row, renormalised: (rows, 2 * tokens), first ids, then shares."""
    top = distribution.topk(min(tokens, distribution.shape[1]), dim=1)
    shares = top.values / top.values.sum(1, keepdim=True)
    padding = tokens - top.indices.shape[1]
    return torch.cat([F.pad(top.indices.double(), (0, padding)), F.pad(shares.double(), (0, padding))], dim=1)
