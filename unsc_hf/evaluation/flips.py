"""Flips: how many decisions on kept inputs change, which is what a user of the model notices.

A retrained model has the same accuracy as the original and still answers some kept inputs differently. The measure is
that of regression-free model updates (Yan et al., "Positive-Congruent Training", CVPR 2021, arXiv 2011.09161). It is
taken over the remaining classes: the logits of forgotten classes are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import beta
from torch import Tensor

from ..errors import UNSCError
from .accuracy import kept_classes


@dataclass(frozen=True)
class Flips:
    """Changed decisions on kept rows, as counts."""

    rows: int
    changed: int  #: rows whose most likely remaining class changed
    negative: int  #: rows that the first model answered rightly and the second does not
    positive: int  #: rows that the second model answers rightly and the first did not
    drift: float  #: `|z - z_0|` / `|z_0|` of the remaining logits, Frobenius, over all rows

    @property
    def share(self) -> float:
        """Changed rows as a share of all."""
        return self.changed / self.rows

    @property
    def negative_share(self) -> float:
        """The negative flip rate."""
        return self.negative / self.rows

    @property
    def upper_95(self) -> float:
        """With 95 % confidence, at most this share of inputs like these rows changes; see `upper_bound`."""
        return upper_bound(self.changed, self.rows)


def count_flips(before: Tensor, after: Tensor, labels: Tensor, forgotten: Sequence[int] = ()) -> Flips:
    """Compare two models' logits on the same kept rows.

    Args:
        before, after: logits, (rows, classes).
        labels: true ids, (rows,).
        forgotten: ids of the classes that are left out.

    Raises:
        UNSCError: logits of different shapes, no rows, or no class that remains.
    """
    if before.shape != after.shape or len(labels) != len(before):
        raise UNSCError(
            f"logits: shapes {tuple(before.shape)}, {tuple(after.shape)} for {len(labels)} labels; use the same rows."
        )
    columns = remaining_columns(before, forgotten)
    old, new = before[:, columns].double(), after[:, columns].double()
    first, second = columns[old.argmax(1)], columns[new.argmax(1)]
    was_right, is_right = first == labels, second == labels
    return Flips(
        rows=len(before),
        changed=int((first != second).sum()),
        negative=int((was_right & ~is_right).sum()),
        positive=int((~was_right & is_right).sum()),
        drift=float((new - old).norm() / old.norm()),
    )


def remaining_columns(logits: Tensor, forgotten: Sequence[int] = ()) -> Tensor:
    """Ids of the remaining classes, those that decisions are taken among, (classes remaining,).

    Raises:
        UNSCError: no rows, or no class that remains.
    """
    kept = kept_classes(logits.shape[1], forgotten)
    if len(logits) == 0 or not kept:
        raise UNSCError(f"logits: {len(logits)} rows, {len(kept)} remaining classes; flips need at least one of each.")
    return torch.tensor(kept, device=logits.device)


def upper_bound(count: int, rows: int) -> float:
    """Exact one-sided 95 % upper bound on a share of which `count` of `rows` independent draws were seen.

    Clopper and Pearson, Biometrika 26 (1934). None of 1,000 gives 0.3 %, three give 0.8 %.
    """
    return 1.0 if count >= rows else float(beta.ppf(0.95, count + 1, rows - count))
