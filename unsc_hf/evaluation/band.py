"""The target of forgetting is a band, not zero: what models that never saw the rows say of them.

A feature that says less than theirs is over-erased. It draws attention, as one does that says more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UNSCError
from .verdict import FAR, LEAST_BAND

TRIES = 5


@dataclass(frozen=True)
class Band:
    """Mean of a reading over retrained models, and how far from it is still like them.

    Attributes:
        mean: of the readings.
        reach: two standard deviations, at least a point.
    """

    mean: float
    reach: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Band:
        """From the readings of retrained models.

        Raises:
            UNSCError: fewer than two, or one that is not a number.
        """
        if len(values) < 2 or not np.isfinite(values).all():
            raise UNSCError(
                f"references: {list(values)} given; a band needs the readings of two retrained models or more."
            )
        return cls(float(np.mean(values)), max(FAR * float(np.std(values, ddof=1)), LEAST_BAND))

    def distance(self, value: float) -> float:
        """How far a reading lies from the mean, in units of the reach: within 1 it is inside."""
        return abs(value - self.mean) / self.reach


def choose_strength(read: Callable[[float], float], band: Band, start: float, tries: int = TRIES) -> float:
    """The strength of erasure whose reading lies nearest the middle of the band.

    The reading falls as the strength grows, so the interval [0, 1] is bisected. The search ends as soon as a reading
    lies in the inner half of the band.

    Args:
        read: reading on *validation* rows at a strength in [0, 1].
        band: of retrained models on the same rows.
        start: the strength that is tried first.
        tries: readings at most.
    """
    seen: dict[float, float] = {}
    low, high, at = 0.0, 1.0, start
    for _ in range(tries):
        seen[at] = read(at)
        if band.distance(seen[at]) <= 0.5:
            break
        low, high = (at, high) if seen[at] > band.mean else (low, at)
        at = (low + high) / 2 if high - low > 0.05 or high < 1 else 1.0
        if low == 0.0 and high <= 0.1:
            at = 0.0
        if at in seen:
            break
    return min(seen, key=lambda strength: band.distance(seen[strength]))
