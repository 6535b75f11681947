"""`UNSCConfig`: every option of unlearning, on top of transformers' `TrainingArguments`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .errors import UNSCError, closest
from .nullspace.rules import RULES, check_energy
from .objectives import OBJECTIVES
from .objectives.pseudo_labels import STRATEGIES
from .utils.sizes import size_in_bytes

REFUSED = {
    "deepspeed": "its engine updates weights where no projection can follow; use DDP (torchrun) or FSDP2",
    "remove_unused_columns": "it would drop the pseudo-labels; the trainer already passes on only what the model reads",
    "load_best_model_at_end": "it may bring back a checkpoint from before unlearning; the last state within the leak "
    "budget is kept anyway",
    "fp16_full_eval": "evaluation would round the weights that are being certified",
    "bf16_full_eval": "evaluation would round the weights that are being certified",
}
# Up to this energy nothing is decided by directions as small as the rounding of float32 products.
_COARSE_ENERGY = 0.9999
NULL_SPACES = ("retained", "random", "none")


def _help(text: str, choices: Iterable[str] | None = None) -> dict[str, Any]:
    """What the command line prints of a field."""
    return {"help": text} if choices is None else {"help": text, "choices": list(choices)}


@dataclass
class UNSCConfig(TrainingArguments):
    """Options of `UNSCTrainer`, on top of all `TrainingArguments`. The defaults work untouched for image classifiers.

    Parameters that control the subspace:
        subspace_rule (`str`, defaults to `"energy"`): how many directions of the retained activations are kept fixed.
            `"energy"`, `"rank"` and `"ratio"` read the sum of all classes' moments; `"class_energy"` applies the energy
            rule to each class and joins the bases (the paper's); `"released_ramp"` is the released code's threshold.
            See `unsc_hf.nullspace.rules`.
        energy (`float`, defaults to `0.99`): share of the retained energy that is kept fixed, in (0, 1].
        subspace_size (`float`, *optional*): for rule `"rank"` the number of directions, for rule `"ratio"` the
            forgotten against the retained energy from which on a direction is free.
        target_modules (`list[str]`, *optional*): names or endings of the modules to train. None trains every layer that
            can be protected.
        null_space (`str`, defaults to `"retained"`): `"retained"` is UNSC. `"random"` (a random subspace of the same
            ranks) and `"none"` (no projection) are controls for comparison, never for use. They have no leak budget.

    Parameters that control the statistics:
        rows_per_direction (`int`, *optional*, defaults to `4`): activation rows that are read for each direction of a
            layer's input, evenly over the classes. None reads all rows, as `energy` 1.0 does.
        max_statistics_memory (`str`, *optional*): limit on the extra memory of the statistics on the model's device,
            such as `"2GB"`. Layers are then read in several passes over the data. None means one pass.

    Parameters that control forgetting:
        objective (`str`, defaults to `"unsc"`): what is minimised on the forget rows; see `unsc_hf.objectives`. Every
            objective runs under the same projection.
        objective_args (`dict` or `str`, *optional*): options of the objective, such as `{"beta": 0.1}`, as JSON, or as
            `"beta=0.1,gamma=0.0"`. Objectives that read retained rows also take `retain_weight`.
        pseudo_labels (`str`, *optional*): how forgotten rows are labelled anew; see `unsc_hf.objectives.pseudo_labels`.
            None means `"soft"` for whole classes and `"matched"` for single rows; the paper's is `"top1"`.
        pseudo_label_temperature (`float`, defaults to `0.5`): temperature of `"soft"`. 1 is the original's own
            distribution over the remaining classes; towards 0 it becomes `"top1"`.
        lr_doubling_steps (`int`, *optional*, defaults to `40`): steps in which the learning rate doubles, with the
            constant schedule, until the target or the leak budget is reached. None keeps it constant.
        target_forget_accuracy (`float`, *optional*): unlearning stops when the accuracy on the forget rows (for whole
            classes: on a validation part of them) is at or below this share. None leaves the target to the kind of
            request; see `unsc_hf.trainer.goals`.
        displacement_decay (`float`, defaults to `0.2`): share of each layer's change that fades at the first steps, so
            that what forgetting does not need disappears. It halves whenever the learning rate doubles. 0 means none.
        max_leak (`float`, *optional*, defaults to `0.1`): budget on the held-out leak.
        max_flips (`float`, *optional*, defaults to `0.1`): budget on the share of held-out retained rows whose decision
            changes; for classifiers, and where three rows or more may change. The last state within both budgets is
            kept.
        check_steps (`int`, defaults to `5`): optimiser steps between two checks of accuracy and leak.
        validation_fraction (`float`, defaults to `0.1`): share of forget and retain rows that is held out for the
            checks. Of whole classes at least 50 forget rows are held out, or 40 % where there are fewer than 125.

    Parameters that describe the data:
        drop_overlap (`bool`, defaults to `False`): leave rows to keep out that are copies of rows to forget. Otherwise
            they are refused.
        label_column (`str`, *optional*): column with class ids; detected when None.
        text_columns (`list[str]`, *optional*): column with the text, or the two of a pair; detected when None.
        completion_only_loss (`bool`, defaults to `True`): for language models, forget the tokens of the completions
            alone, not those of the prompts.
    """

    subspace_rule: str = field(default="energy", metadata=_help("Rule for the directions that are kept fixed.", RULES))
    energy: float = field(default=0.99, metadata=_help("Share of the retained energy that is kept fixed, in (0, 1]."))
    subspace_size: float | None = field(
        default=None, metadata=_help("Number for subspace_rule 'rank' (directions) and 'ratio' (of energies).")
    )
    target_modules: list[str] | None = field(
        default=None, metadata=_help("Names or endings of the modules to train; all by default.")
    )
    null_space: str = field(
        default="retained", metadata=_help("'retained' is UNSC; the others are controls.", NULL_SPACES)
    )

    rows_per_direction: int | None = field(
        default=4, metadata=_help("Activation rows read for each direction of a layer's input.")
    )
    max_statistics_memory: str | None = field(
        default=None, metadata=_help('Limit on the extra memory of the statistics, such as "2GB".')
    )

    objective: str = field(default="unsc", metadata=_help("What is minimised on the forget rows.", OBJECTIVES))
    objective_args: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Options of the objective, as JSON or as 'retain_weight=2'.")
    )
    pseudo_labels: str | None = field(
        default=None,
        metadata=_help(
            "How forgotten rows are labelled anew; by default soft for classes, matched for rows.", STRATEGIES
        ),
    )
    pseudo_label_temperature: float = field(
        default=0.5, metadata=_help("Temperature of soft pseudo-labels; towards 0 they become top1.")
    )
    lr_doubling_steps: int | None = field(
        default=40, metadata=_help("Steps in which the (otherwise constant) learning rate doubles.")
    )
    target_forget_accuracy: float | None = field(
        default=None,
        metadata=_help(
            "Stop when accuracy on the forget rows is at or below this share; by default 0.002 for classes."
        ),
    )
    displacement_decay: float = field(
        default=0.2, metadata=_help("Share of each layer's change that fades at the first steps, in [0, 1).")
    )
    max_leak: float | None = field(
        default=0.1, metadata=_help("Budget on the held-out leak; the last state within it is kept.")
    )
    max_flips: float | None = field(
        default=0.1, metadata=_help("Budget on the share of held-out retained rows whose decision changes.")
    )
    check_steps: int = field(default=5, metadata=_help("Optimiser steps between two checks."))
    validation_fraction: float = field(default=0.1, metadata=_help("Share of rows held out for the checks."))

    drop_overlap: bool = field(
        default=False, metadata=_help("Do not keep rows that are copies of rows to forget; otherwise they are refused.")
    )
    label_column: str | None = field(default=None, metadata=_help("Column with class ids."))
    text_columns: list[str] | None = field(default=None, metadata=_help("Column with the text, or two for pairs."))
    completion_only_loss: bool = field(
        default=True, metadata=_help("Language models: forget the completions alone, not the prompts.")
    )

    # TrainingArguments with other defaults.
    learning_rate: float = field(default=1e-4, metadata=_help("Learning rate."))
    optim: str = field(default="adamw_torch", metadata=_help("Optimiser; any torch optimiser stays in the null space."))
    lr_scheduler_type: str = field(default="constant", metadata=_help("Learning rate schedule."))
    max_steps: int = field(default=400, metadata=_help("Upper limit of optimiser steps; -1 uses num_train_epochs."))
    per_device_train_batch_size: int = field(default=128, metadata=_help("Forget rows per step and device."))
    per_device_eval_batch_size: int = field(default=256, metadata=_help("Rows per evaluation batch and device."))
    save_strategy: str = field(default="no", metadata=_help("When checkpoints are written."))
    logging_steps: float = field(default=5, metadata=_help("Steps between two log lines."))
    hub_strategy: str = field(default="end", metadata=_help("Only 'end': half-unlearned weights are never pushed."))
    remove_unused_columns: bool = field(default=False, metadata=_help("Handled by the trainer's collator."))

    @property
    def is_control(self) -> bool:
        """Whether this run is a control, whose update is not confined to the null space of the retained rows."""
        return self.null_space != "retained"

    @property
    def is_exact(self) -> bool:
        """Whether every direction of the retained rows is kept, so that their outputs change by rounding alone."""
        whole = self.subspace_rule in ("energy", "class_energy") and self.energy >= 1.0
        return whole and not self.is_control

    @property
    def leak_budget(self) -> float | None:
        """`max_leak`; None for controls, which leave the null space on purpose."""
        return None if self.is_control else self.max_leak

    @property
    def flips_budget(self) -> float | None:
        """`max_flips`; None for controls."""
        return None if self.is_control else self.max_flips

    @property
    def row_budget(self) -> int | None:
        """`rows_per_direction`; None where every direction counts, however rare."""
        return None if self.is_exact else self.rows_per_direction

    @property
    def per_class_statistics(self) -> bool:
        """Whether the subspace rule needs each class's moments apart."""
        return self.subspace_rule in ("class_energy", "released_ramp")

    @property
    def subspace_options(self) -> dict[str, Any]:
        """Keywords of `nullspace.rules.build_subspace`."""
        return {"rule": self.subspace_rule, "energy": self.energy, "size": self.subspace_size}

    @property
    def product_dtype(self) -> torch.dtype:
        """Precision in which statistics multiply rows. float32 is twice as fast and on many devices far more."""
        coarse = self.subspace_rule == "energy" and self.energy <= _COARSE_ENERGY
        return torch.float32 if coarse else torch.float64

    @property
    def objective_options(self) -> dict[str, Any]:
        """All options of the objective, `objective_args` in place of their defaults."""
        return OBJECTIVES[self.objective].options(parse_objective_args(self.objective_args))

    def control(self, null_space: str) -> UNSCConfig:
        """A copy for a control run: another `null_space`, no checkpoints, nothing published."""
        options = deepcopy(self)
        options.null_space = null_space
        options.push_to_hub = False
        if options.is_control:  # its checkpoints would take the place of the real run's
            options.save_strategy = SaveStrategy.NO
        return options

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_objective_args()
        if self.hub_strategy != "end":
            raise UNSCError(
                f"hub_strategy: {self.hub_strategy!r} would push half-unlearned weights, and a repository's history "
                "keeps them; use 'end'."
            )
        for argument, reason in REFUSED.items():
            if getattr(self, argument):
                raise UNSCError(f"{argument}: not supported, {reason}.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise each of several processes on CPUs would believe to be alone
        if self.fsdp and (self.bf16 or self.fp16):
            raise UNSCError(
                "fsdp: sharded weights are gathered in half precision under bf16 or fp16, and statistics would be read "
                "through them; leave both off, or use DDP (torchrun)."
            )
        super().__post_init__()

    def _check_objective_args(self) -> None:
        """Refuse options that no objective has. Those of the objective itself are checked when they are read."""
        known = {name for objective in OBJECTIVES.values() for name in objective.options({})}
        for name in parse_objective_args(self.objective_args):
            if name not in known:
                raise UNSCError(
                    f"objective_args: no objective has an option {name!r}; closest: {closest(name, sorted(known))}."
                )

    def _check_choices(self) -> None:
        """Refuse unknown names, and rules without their number."""
        for argument, options in (
            ("subspace_rule", RULES),
            ("pseudo_labels", STRATEGIES),
            ("null_space", NULL_SPACES),
            ("objective", tuple(OBJECTIVES)),
        ):
            value = getattr(self, argument)
            if value is not None and value not in options:
                raise UNSCError(f"{argument}: {value!r} does not exist; choose from {', '.join(options)}.")
        if self.subspace_rule in ("rank", "ratio") and self.subspace_size is None:
            raise UNSCError(
                "subspace_size: not given; rule 'rank' needs the number of directions to keep, rule 'ratio' a positive "
                "number such as 1.5."
            )

    def _check_numbers(self) -> None:
        """Refuse numbers outside their range."""
        check_energy(self.energy)
        size_in_bytes(self.max_statistics_memory, "max_statistics_memory")
        if self.target_forget_accuracy is not None and not 0.0 <= self.target_forget_accuracy < 1.0:
            raise UNSCError(
                f"target_forget_accuracy: {self.target_forget_accuracy!r} is outside [0, 1); it is a share, "
                "not percent."
            )
        if self.max_leak is not None and not (math.isfinite(self.max_leak) and self.max_leak > 0):
            raise UNSCError(f"max_leak: {self.max_leak!r} is not a positive number; use None for no budget.")
        if self.max_flips is not None and not 0.0 < self.max_flips <= 1.0:
            raise UNSCError(
                f"max_flips: {self.max_flips!r} is outside (0, 1]; it is a share, not percent. None means no budget."
            )
        if not 0.0 <= self.displacement_decay < 1.0:
            raise UNSCError(f"displacement_decay: {self.displacement_decay!r} is outside [0, 1); 0 switches it off.")
        if not self.pseudo_label_temperature > 0:
            raise UNSCError(f"pseudo_label_temperature: {self.pseudo_label_temperature!r} is not a positive number.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise UNSCError(f"validation_fraction: {self.validation_fraction!r} is outside (0, 1).")
        for argument in ("check_steps", "lr_doubling_steps", "rows_per_direction"):
            value = getattr(self, argument)
            if value is not None and value < 1:
                raise UNSCError(f"{argument}: {value!r} is not a positive number.")


def parse_objective_args(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """Options of an objective from Python or from the command line.

    Raises:
        UNSCError: neither a dict, nor a JSON object, nor a list of `name=value`.
    """
    if given is None:
        return {}
    if isinstance(given, dict):
        return given
    text = given.strip()
    if not text.startswith("{"):
        pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
        text = "{" + ", ".join(f'"{name.strip()}": {value.strip()}' for name, _, value in pairs) + "}"
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise UNSCError(
            f"objective_args: cannot read {given!r}; write 'beta=0.1,gamma=0' or a JSON object "
            "(true and false in lower case)."
        ) from error
    return dict(options)
