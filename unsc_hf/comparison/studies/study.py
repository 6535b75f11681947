"""What a study is: runs that differ in one thing, a picture of them, and a paragraph that says what they show."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure

from ..summary import half_interval, with_interval
from .lab import Lab, Point


class Points(list[Mapping[str, Any]]):
    """What a study measured: each point is a flat mapping of tags and numbers."""

    def where(self, **tags: Any) -> Points:
        """Points with these tags, without the failed ones."""
        return Points(p for p in self if "error" not in p and all(p.get(tag) == value for tag, value in tags.items()))

    def by(self, tag: str) -> dict[Any, Points]:
        """Points by the value of a tag, in the order of their first point, without the failed ones."""
        values = dict.fromkeys(p[tag] for p in self.where() if p.get(tag) is not None)
        return {value: self.where(**{tag: value}) for value in values}

    def values(self, key: str) -> list[float]:
        """Known numbers."""
        return [float(p[key]) for p in self if p.get(key) is not None]

    def mean(self, key: str) -> float:
        """Mean over points, NaN without any."""
        known = self.values(key)
        return float(np.mean(known)) if known else float("nan")

    def half(self, key: str) -> float:
        """Half the 95 % interval over points; 0 where it cannot be given."""
        return half_interval(self.values(key)) or 0.0

    def percent(self, key: str) -> str:
        """Mean ± half interval, in percent; a dash where nothing was measured."""
        known = self.values(key)
        half = half_interval(known)
        return with_interval(100 * self.mean(key), None if half is None else 100 * half) if known else "–"


class Study(ABC):
    """A question, and what answers it; register a subclass with `@register`.

    Attributes:
        name: how it is asked for.
        title: its question.
        tags: heading by key of what tells runs apart, in the order of the table.
        numbers: heading by key of what is averaged over seeds.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    tags: ClassVar[Mapping[str, str]]
    numbers: ClassVar[Mapping[str, str]] = {
        "AccDut": "AccDut", "AccDrt": "AccDrt", "leak": "leak", "steps": "steps", "seconds": "seconds",
    }  # fmt: skip

    @abstractmethod
    def measure(self, lab: Lab) -> list[Point]:
        """Run it; the numbers of runs that differ in their seed alone are averaged."""

    @abstractmethod
    def plot(self, points: Points) -> Figure:
        """Its picture."""

    @abstractmethod
    def paragraph(self, points: Points) -> str:
        """What the points show, in words made from them."""


STUDIES: dict[str, Study] = {}


def register(study: type[Study]) -> type[Study]:
    """Decorator: make a study known by its name."""
    STUDIES[study.name] = study()
    return study
