"""What an objective is: a loss over `Terms`, registered under its own name together with what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UNSCError, closest

NEEDS = ("retained", "teacher", "retain_teacher", "hidden", "refusal")


@dataclass(frozen=True)
class Objective:
    """A method by its loss.

    Attributes:
        name: how it is asked for.
        run: scalar loss from the `Terms` of a batch and the objective's own options as keywords.
        needs: what the trainer provides besides the forget rows: "retained" (a batch of retained rows), "teacher" and
            "retain_teacher" (the original model's logits on forget rows and on retained rows), "hidden" (hidden states
            of a language model after the block that the option `layer` numbers; beside "retained"), "refusal"
            (the likelihood of a refusal in place of each answer).
        defaults: its options and their defaults, the keyword arguments of `run`.
    """

    name: str
    run: Callable[..., Tensor]
    needs: frozenset[str]
    defaults: Mapping[str, Any]

    @property
    def rehearses(self) -> bool:
        """Whether retained rows are read in training."""
        return "retained" in self.needs

    @property
    def keeps_original(self) -> bool:
        """Whether a second, whole model stays in memory."""
        return bool(self.needs & {"teacher", "retain_teacher", "hidden", "refusal"})

    def own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given options that this objective has, for commands that run several objectives."""
        return {name: value for name, value in given.items() if name in self.defaults}

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of this objective, the given ones in place of their defaults.

        Raises:
            UNSCError: an option that this objective does not have, or a value of another kind.
        """
        known = dict(self.defaults)
        for name, value in given.items():
            if name not in known:
                listed = closest(name, known) if known else "it has none"
                raise UNSCError(
                    f"objective_args: objective {self.name!r} has no option {name!r}; its options: {listed}."
                )
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UNSCError(f"objective_args: {name}={value!r} should be a {type(known[name]).__name__}.")
            known[name] = value
        if not known.get("beta", 1.0) > 0:
            raise UNSCError(f"objective_args: beta={known['beta']!r} is not a positive number.")
        return known

    def loss(self, terms: Any, options: Mapping[str, Any] | None = None) -> Tensor:
        """Scalar loss of a batch; `options` as `Objective.options` returns them, the defaults when None."""
        chosen = self.defaults if options is None else {name: options[name] for name in self.defaults}
        return self.run(terms, **chosen)


OBJECTIVES: dict[str, Objective] = {}


def objective(needs: Collection[str] = ()) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: register a function as an objective; its keyword-only arguments become its options."""
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"needs: {sorted(unknown)[0]!r} does not exist; choose from {', '.join(NEEDS)}.")

    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(run).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
        OBJECTIVES[run.__name__] = Objective(run.__name__, run, frozenset(needs), defaults)
        return run

    return register
