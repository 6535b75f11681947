"""New labels for the rows to forget: the most similar classes that remain, as the original model sees them.

UNSC (arXiv 2404.13588, section 4.2) takes the original model's most likely class among the remaining ones, "top1". A
row that is pushed towards one label with full confidence takes retained rows of neighbouring classes with it. "soft" is
the original's own distribution over the remaining classes: it asks only that the forgotten class disappears, and its
gradient vanishes once it has. "matched" serves requests of single rows. A model that never saw a row still
answers most such rows rightly, so they are labelled to be known as well as unseen rows are, not as badly as
possible. The other strategies exist to be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UNSCError
from ..models.outputs import Outputs

STRATEGIES = ("top1", "soft", "second", "random", "nearest_mean", "matched")


def pseudo_labels(
    strategy: str,
    forget: Outputs,
    remaining: Sequence[int],
    *,
    retain: Outputs | None = None,
    matching: Matching | None = None,
    temperature: float = 1.0,
    seed: int | torch.Generator = 0,
) -> Tensor:
    """Labels for the forget rows; but for "matched" never a row's own label and never a class that does not remain.

    Args:
        strategy: "top1": the most likely remaining class; "second": the second most likely; "soft": the softmax over
            the remaining classes, of logits divided by `temperature`; "random": uniform over them; "nearest_mean": the
            class whose mean head input over `retain` is nearest (Euclidean). "matched": a distribution that
            knows each row as well as unseen rows are known.
        forget: the original model's outputs on the forget rows, in eval mode.
        remaining: ids of the classes that still occur in the retained data.
        retain: outputs on retained rows, for "nearest_mean".
        matching: for "matched".
        temperature: of "soft"; towards 0 it becomes "top1".
        seed: for "random"; a generator goes on where it was.

    Returns:
        int64 ids of shape (rows,), or for "soft" and "matched" a float32 distribution of shape (rows, labels).

    Raises:
        UNSCError: unknown strategy, or too few remaining classes for it.
    """
    if strategy not in STRATEGIES:
        raise UNSCError(f"pseudo_labels: {strategy!r} does not exist; choose from {', '.join(STRATEGIES)}.")
    if strategy == "matched":
        if matching is None:
            raise UNSCError("pseudo_labels: 'matched' needs unseen_dataset, rows that the original model never saw.")
        return matching.labels(forget)
    (rows, classes), place = forget.logits.shape, forget.logits.device
    allowed = torch.zeros(rows, classes, dtype=torch.bool, device=place)
    allowed[:, torch.as_tensor(list(remaining), dtype=torch.long, device=place)] = True
    allowed[torch.arange(rows, device=place), forget.labels] = False
    fewest = int(allowed.sum(1).min()) if rows else len(remaining)
    needed = 2 if strategy == "second" else 1
    if fewest < needed:
        raise UNSCError(
            f"pseudo_labels: {strategy!r} needs {needed} remaining classes besides a row's own, found {fewest}; keep "
            "more classes."
        )

    if strategy in ("top1", "second"):
        return _masked(forget.logits, allowed).topk(needed, dim=1).indices[:, needed - 1]
    if strategy == "soft":
        return (_masked(forget.logits, allowed) / temperature).softmax(1)
    if strategy == "random":
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        noise = torch.rand(rows, classes, generator=generator)  # on the CPU: the same labels everywhere
        return _masked(noise.to(place), allowed).argmax(1)
    if retain is None:
        raise UNSCError("pseudo_labels: 'nearest_mean' needs outputs on retained rows.")
    means = torch.full((classes, forget.need_features().shape[1]), torch.inf)
    for label in sorted(set(retain.labels.tolist())):
        means[label] = retain.need_features()[retain.labels == label].mean(0)
    return _masked(-torch.cdist(forget.need_features(), means), allowed).argmax(1)


@dataclass(frozen=True)
class Matching:
    """How well rows are known: places of the rows to forget, and probabilities that unseen rows give their true labels.

    Attributes:
        places: margins of the rows to forget under the original model, sorted, (forget rows,).
        unseen: probabilities of the true labels of unseen rows, sorted, (unseen rows,).
    """

    places: Tensor
    unseen: Tensor

    @classmethod
    def of(cls, forget: Iterable[Outputs], unseen: Iterable[Outputs]) -> Matching:
        """From the original model's outputs, batch by batch."""
        places = torch.cat([margin(part).cpu() for part in forget])
        known = [part.logits.double().softmax(1).gather(1, part.labels[:, None])[:, 0].cpu() for part in unseen]
        return cls(places.sort().values, torch.cat(known).sort().values)

    def labels(self, forget: Outputs) -> Tensor:
        """Distributions (rows, labels).

        A row at some quantile of the margins gives its true label the probability at the same quantile of the unseen
        rows. The other labels share the rest as they do under the original model.
        """
        own = margin(forget)
        place = torch.searchsorted(self.places.to(own.device), own, right=True).double() - 0.5
        index = (place / len(self.places) * len(self.unseen)).long().clamp_min(0)
        true = self.unseen.to(own.device)[index]
        others = forget.logits.double().scatter(1, forget.labels[:, None], -torch.inf).softmax(1)
        return (others * (1 - true)[:, None]).scatter(1, forget.labels[:, None], true[:, None]).float()


@dataclass
class MatchedTargets:
    """Targets of matched rows while the model changes.

    Attributes:
        matching: as the original knew the rows.
        outputs: the original's, on the rows to forget.
        now: distributions (rows, labels).
    """

    matching: Matching
    outputs: Outputs
    now: Tensor

    def follow(self, losses: Tensor) -> None:
        """Match with unseen rows of these losses, sorted, (unseen rows,)."""
        self.now = replace(self.matching, unseen=(-losses).exp().flip(0)).labels(self.outputs)


def margin(outputs: Outputs) -> Tensor:
    """Logit of the true label above the best other one, (rows,), float64."""
    logits = outputs.logits.double()
    true = logits.gather(1, outputs.labels[:, None])[:, 0]
    return true - logits.scatter(1, outputs.labels[:, None], -torch.inf).amax(1)


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed | scores.isnan(), -torch.inf)


def sparse(distribution: Tensor, tokens: int) -> Tensor:
    """The `tokens` largest shares of each row, renormalised: (rows, 2 * tokens), first ids, then shares."""
    top = distribution.topk(min(tokens, distribution.shape[1]), dim=1)
    shares = top.values / top.values.sum(1, keepdim=True)
    padding = tokens - top.indices.shape[1]
    return torch.cat([F.pad(top.indices.double(), (0, padding)), F.pad(shares.double(), (0, padding))], dim=1)
