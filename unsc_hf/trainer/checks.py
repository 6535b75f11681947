"""The checks of a run: what is looked at, and the callback that decides when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..nullspace.projection import NullSpaceProjection

if TYPE_CHECKING:
    from ..config import UNSCConfig
    from .goals import ForgettingGoal

_BISECTIONS = 6
_NEARLY_FORGOTTEN = 0.05  # below this accuracy ...
_PATIENCE = 20  # ... so many steps without progress are a plateau: a few odd rows are not worth ever larger steps


@dataclass(frozen=True)
class Check:
    """One look at the model while it unlearns.

    Attributes:
        forget_accuracy, forget_loss: on the validation part of the forget set, against the true labels (accuracy: mean
            over classes; loss: that of the class which is known best).
        retain_accuracy: on held-out retained rows.
        leak: on the same held-out retained rows.
        exposure: of single rows of a classifier, the chance that one is known better than an unseen row.
        flips, negative_flips: of a classifier, shares of held-out retained rows whose decision among the remaining
            classes changed, and whose right decision became wrong.
        gap: where retained rows are rehearsed, how much more often forget rows than unseen rows are answered rightly
            (`evaluation.membership.accuracy_gap`).
    """

    forget_accuracy: float
    forget_loss: float
    retain_accuracy: float
    leak: float
    exposure: float | None = None
    gap: float | None = None
    flips: float | None = None
    negative_flips: float | None = None

    @property
    def known(self) -> float:
        """What is compared with the target: exposure where there is one, else accuracy."""
        return self.forget_accuracy if self.exposure is None else self.exposure

    def reached(self, target: float, least_loss: float = 0.0) -> bool:
        """Whether no more is known than the target, `forget_loss` is at least `least_loss`, and there is no gap.

        A gap is waived once the losses of forget rows are larger than those of unseen rows: getting more of them wrong
        would only make them stand out.
        """
        return (
            self.forget_loss >= least_loss
            and self.known <= target
            and (self.gap is None or self.gap <= 0 or self.known <= 1 - target)
        )

    def logged(self) -> dict[str, float]:
        """What is measured, for the log."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class StoppingCallback(TrainerCallback):
    """Checks every `check_steps`, stops when forgetting is reached, and keeps the last state within the budgets.

    Attributes:
        reason: why unlearning ended: "target", "plateau" (nearly forgotten, and no further for a while), "leak_budget",
            "flips_budget", "max_steps", or "stopped" (by another callback).
    """

    def __init__(
        self, projection: NullSpaceProjection, check: Callable[[], Check], log: Callable[[dict[str, float]], None],
        args: UNSCConfig, goal: ForgettingGoal, max_flips: float | None,
    ) -> None:  # fmt: skip
        """
        Args:
            projection: holds the weights that are restored.
            check: looks at the model.
            log: the trainer's.
            args: when to check, and the budget on the leak.
            goal: the target, and whether the last stretch is walked back to where it is just reached.
            max_flips: budget on changed decisions; None for none.
        """
        self.projection, self.check, self.log = projection, check, log
        self.check_steps, self.max_leak, self.max_flips = args.check_steps, args.leak_budget, max_flips
        self.target, self.least_loss, self.refine = goal.target, goal.least_loss, goal.refines
        self.reason = "max_steps"
        self._within_budget: dict[str, Tensor] = {}
        self._checked_at = -1
        self._there_at_start = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.reason = "max_steps"
        self._checked_at = state.global_step
        self._within_budget = self.projection.snapshot()
        # Also where a run is resumed: targets that follow the model must be those of the checkpoint.
        check = self.check()
        self._there_at_start = check.reached(self.target)
        if state.global_step == 0:
            self.log(check.logged())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Also before a checkpoint is written, so that what is saved is always within the budget.
        if state.global_step % self.check_steps == 0 or control.should_save or state.global_step >= state.max_steps:
            self._decide(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._decide(state, control)

    def _decide(self, state: TrainerState, control: TrainerControl) -> None:
        """Check once at this step; restore and stop above the budget, stop at the target."""
        if self._checked_at == state.global_step:
            return
        self._checked_at = state.global_step
        check = self.check()
        self.log(check.logged())
        spent = self._overspent(check)
        if spent is not None:
            self.projection.restore(self._within_budget)
            self._stop(control, spent)
            return
        before, self._within_budget = self._within_budget, self.projection.snapshot()
        if check.reached(self.target, self.least_loss):
            self._stop(control, "target")
            if self.refine:
                self._step_back(before, self._within_budget)
        elif not self.refine and check.known > self.target and _on_plateau(state, check):
            self._stop(control, "plateau")

    def _overspent(self, check: Check) -> str | None:
        """The budget that this state exceeds."""
        if self.max_leak is not None and check.leak > self.max_leak:
            return "leak_budget"
        if self.max_flips is not None and check.flips is not None and check.flips > self.max_flips:
            return "flips_budget"
        return None

    def _stop(self, control: TrainerControl, reason: str) -> None:
        """End here, without a checkpoint: a run resumed from one would not know that it had ended."""
        self.reason = reason
        control.should_training_stop, control.should_save = True, False

    def _step_back(self, above: Mapping[str, Tensor], below: Mapping[str, Tensor]) -> None:
        """Bisect between a state above the target and one that reached it. All states between lie in the null space.

        Where the run began below the target, the smallest step that bisection can take is tried first.
        """
        low, high = 0.0, 1.0
        if self._there_at_start:
            least = 2.0**-_BISECTIONS
            self.projection.restore(_between(above, below, least))
            if self.check().reached(self.target):
                low = high = least
        while high - low > 2.0**-_BISECTIONS:
            middle = (low + high) / 2
            self.projection.restore(_between(above, below, middle))
            if self.check().reached(self.target):
                high = middle
            else:
                low = middle
        self._within_budget = _between(above, below, high)
        self.projection.restore(self._within_budget)
        self.log(self.check().logged())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.reason == "max_steps" and state.global_step < state.max_steps:
            self.reason = "stopped"  # by another callback
            self._decide(state, control)
        self._within_budget = {}


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: torch.lerp(weight, end[name], share) for name, weight in start.items()}


def _on_plateau(state: TrainerState, check: Check) -> bool:
    """Whether accuracy is low, fell to this value `_PATIENCE` steps ago or more, and the loss was as high by then.

    Both are read from the log, so that a resumed run decides alike.
    """
    seen = [entry for entry in state.log_history if "forget_accuracy" in entry]
    lowest, since = min(((entry["forget_accuracy"], entry["step"]) for entry in seen), default=(1.0, 0))
    if not check.forget_accuracy <= lowest <= _NEARLY_FORGOTTEN or state.global_step - since < _PATIENCE:
        return False
    return check.forget_loss <= max(e["forget_loss"] for e in seen if state.global_step - e["step"] >= _PATIENCE)
