"""What a study is: runs that differ in one thing, a picture of them, and a paragraph that says what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from .lab import Lab

Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Study:
    """An experiment with a name.

    Attributes:
        name: how it is asked for.
        title: its question.
        measure: runs it; every point is a flat mapping of tags and measured numbers.
        tags: heading by key of what tells runs apart, in the order of the table.
        numbers: heading by key of what is averaged over seeds.
        plot: its picture.
        paragraph: what the points show, in words made from them.
    """

    name: str
    title: str
    measure: Callable[[Lab], list[dict[str, Any]]]
    tags: Mapping[str, str]
    numbers: Mapping[str, str]
    plot: Callable[[Points], Figure]
    paragraph: Callable[[Points], str]


STUDIES: dict[str, Study] = {}


def register(study: Study) -> Study:
    """Make a study known by its name."""
    STUDIES[study.name] = study
    return study
