"""A finished run in plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .tables import Table


@dataclass(frozen=True)
class Origin:
    """What was unlearned, as a card names it: no paths of this machine."""

    model: str  # Hub id, or last part of a folder
    dataset: str
    dataset_on_hub: bool = False  # whether `dataset` is a Hub id
    license: str | None = None  # SPDX id
    command: str = ""  # what makes the run again

    @property
    def hub_model(self) -> str | None:
        """The original's Hub id, None where it is a folder's name."""
        return self.model if "/" in self.model else None


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: card, report, `results.json` and the printed summary are all made from it."""

    origin: Origin
    model_class: str
    rows: int  # number of forgotten rows
    forgotten: Sequence[int] = ()  # ids of the classes that were forgotten whole
    class_names: Sequence[str] = ()  # by id
    task: str = "image-classification"  # the Hub's name of what the model does
    base_dtype: str = "float32"  # precision of the model under adapters
    adapter: dict[str, Any] | None = None  # rank and alpha, where only adapters were trained
    digest: str = ""  # beginning of a hash over the forgotten rows
    methods: dict[str, Any] = field(default_factory=dict)  # metrics of each model by name, in the order of the table
    references: list[Any] = field(default_factory=list)  # metrics of each retrained model
    certificate: dict[str, Any] = field(default_factory=dict)  # `Certificate.to_dict()`; empty before a certificate
    verdict: str = "not judged"  # this and the reason as `evaluation.verdict.judge` gives them
    reason: str = "no comparison was made"
    summary: Sequence[str] = ()  # the decision and the sentences of `summary`, from results
    table: Table = field(default_factory=Table)
    options: dict[str, Any] = field(default_factory=dict)  # as they were given
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    layers: list[Any] = field(default_factory=list)  # rows of `Subspace.report()`
    frozen: dict[str, str] = field(default_factory=dict)  # reason by weight that was not trained
    history: list[dict[str, Any]] = field(default_factory=list)  # the checks while unlearning
    requests: list[dict[str, Any]] = field(default_factory=list)  # served on this model, oldest first
    budget: dict[str, float | None] | None = None  # of the leak over all requests: what was given, and what is spent
    details: dict[str, Any] = field(default_factory=dict)  # more entries of `results.json`
    caveats: Sequence[str] = ()  # what a reader must know, in sentences
    model_name: str = ""  # name of the unlearned model, or its Hub id
    pictures: Sequence[tuple[str, str]] = ()  # file names and captions
    report: str = ""  # file name of the HTML report

    @property
    def forgotten_names(self) -> list[str]:
        """Names of the classes that were forgotten whole."""
        return [self.class_names[c] for c in self.forgotten]
