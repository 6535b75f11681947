"""A method of unlearning is a function from a `Workbench` to an unlearned model, registered under its own name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench

Run = Callable[..., PreTrainedModel]

LEARNING_RATES = ({"learning_rate": 1e-4}, {"learning_rate": 3e-5}, {"learning_rate": 3e-4})


@dataclass(frozen=True)
class Method:
    """One way to forget.

    `run` makes an unlearned model; it is called with a `Workbench` and one of `settings` as keywords. They are chosen
    from on validation rows: every method has three tries, except those that have nothing to choose.
    """

    name: str  # the function's name
    title: str  # how tables call it
    run: Run
    settings: tuple[Mapping[str, Any], ...] = ({},)


METHODS: dict[str, Method] = {}


def method(title: str, settings: Sequence[Mapping[str, Any]] = ({},)) -> Callable[[Run], Run]:
    """Decorator: register a function as a method."""

    def register(run: Run) -> Run:
        METHODS[run.__name__] = Method(run.__name__, title, run, tuple(settings))
        return run

    return register


def trainer_method(
    name: str, title: str, settings: Sequence[Mapping[str, Any]] = LEARNING_RATES, **options: Any
) -> None:
    """Register what the trainer makes with these options of `UNSCConfig`."""

    def run(bench: Workbench, **chosen: Any) -> PreTrainedModel:
        return bench.unlearn(**options, **chosen)

    METHODS[name] = Method(name, title, run, tuple(settings))
