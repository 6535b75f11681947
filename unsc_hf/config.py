"""`UNSCConfig`: every option of unlearning, on top of transformers' `TrainingArguments`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .errors import UNSCError
from .nullspace.subspace import MERGES, RULES, check_energy
from .objectives import OBJECTIVES
from .objectives.pseudo_labels import STRATEGIES
from .utils.sizes import parse_size

REFUSED = {
    "deepspeed": "its engine updates weights where no projection can follow; use DDP (torchrun) or FSDP2",
    "remove_unused_columns": "it would drop the pseudo-labels; the trainer already passes on only what the model reads",
    "load_best_model_at_end": "it may bring back a checkpoint from before unlearning; the leak budget keeps the last good state",
    "fp16_full_eval": "evaluation would round the weights that are being certified",
    "bf16_full_eval": "evaluation would round the weights that are being certified",
}
_COARSE = 0.9999  # up to this energy, what float32 products round away (1e-7 of the largest eigenvalue) decides nothing
NULL_SPACES = ("retained", "random", "none")
ERASURES = ("none", "head", "layers")


@dataclass
class UNSCConfig(TrainingArguments):
    """Options of `UNSCTrainer`. Defaults work untouched for image classifiers; all `TrainingArguments` are accepted.

    Parameters that control the subspace:
        subspace_rule (`str`, defaults to `"energy"`): how many directions of the retained activations are kept fixed:
            `"energy"`, `"rank"`, `"ratio"` or `"released_ramp"`; see `unsc_hf.subspace.build_subspace`.
        energy (`float`, defaults to `0.99`): share of the retained energy kept fixed, in (0, 1].
        subspace_rank (`int`, *optional*): number of directions for rule `"rank"`.
        subspace_ratio (`float`, *optional*): forgotten against retained energy for rule `"ratio"`.
        subspace_merge (`str`, defaults to `"sum"`): `"sum"` of class moments (exact) or `"concat"` of class bases (paper).
        target_modules (`list[str]`, *optional*): module names or endings to train; every protectable layer when None.
        null_space (`str`, defaults to `"retained"`): `"retained"` is UNSC. `"random"` (a random subspace of the same
            ranks) and `"none"` (no projection) are controls for comparison, never for use.

    Parameters that control the statistics:
        max_rows_per_class (`int`, defaults to `10000`): activation rows per class and layer; None reads all.
        max_samples_per_class (`int`, defaults to `2000`): data set rows per class that are read; None reads all.
        statistics_batch_size (`int`, defaults to `128`): samples per forward pass.
        statistics_dtype (`str`, *optional*): `"float32"` or `"float64"`, in which rows are multiplied; products are summed in float64
            either way. None means float32, twice as fast and on many accelerators far more, where nothing depends on directions as small
            as its rounding: rule `"energy"` up to 0.9999, merged by `"sum"`.
        max_statistics_memory (`str`, *optional*): limit on their extra memory on the model's device, such as `"2GB"`: layers are
            read in several passes, and inputs too wide for it are sketched; see `docs/large_layers.md`. None means one pass.
        sketch_size (`int`, *optional*): columns of every sketch, instead of as many as the limit allows.

    Parameters that control forgetting:
        pseudo_labels (`str`, *optional*): `"top1"`, `"soft"`, `"second"`, `"random"`, `"nearest_mean"`, `"matched"` or `"left_out"`; see
            `unsc_hf.pseudo_labels`. None means `"soft"` for whole classes and `"matched"` for single rows; the paper's is
            `"top1"`.
        pseudo_label_temperature (`float`, defaults to `0.5`): of `"soft"`: 1 is the original's own distribution over the
            remaining classes, towards 0 it becomes `"top1"`.
        lr_doubling_steps (`int`, *optional*, defaults to `40`): with the constant schedule the learning rate doubles every so
            many steps, until the target or the leak budget is reached; None keeps it constant. For single rows of a classifier
            with an objective that rehearses retained rows it grows to ten times the stated one at most: they are to look like unseen rows, and
            settle there.
        target_forget_accuracy (`float`, *optional*): unlearning stops when the accuracy on the forget rows (for whole
            classes: on a validation part of them) is at or below this share. None means 0.002 for whole classes; for single rows
            of a classifier that their losses tell them from `unseen_dataset` no better than chance would (AUC at most 0.5 and a
            standard deviation, 1 / sqrt(12 rows); with rehearsal both as the model knows them then); for answers of a language
            model the token accuracy on unseen ones, and a point.
        max_leak (`float`, defaults to `0.1`): budget on the held-out leak; the last state within it is kept.
        check_steps (`int`, defaults to `5`): optimiser steps between two checks of accuracy and leak.
        validation_fraction (`float`, defaults to `0.1`): share of forget and retain rows held out for these checks. Of whole
            classes at least 50 forget rows are held out, or 40 % where there are fewer than 125.
        max_validation_rows (`int`, defaults to `1000`): at most this many rows are held out of each.
        label_column (`str`, *optional*): column with class ids; found by itself when None.
        objective (`str`, defaults to `"unsc"`): what is minimised on the forget rows: `"unsc"`, `"unsc_retain"`,
            `"unsc_distill"`, `"gradient_ascent"`, `"gradient_difference"`, `"npo"`, `"simnpo"`, `"fine_tune"`, `"scrub"`,
            `"whitened_means"`, `"whitened_covariances"` or `"adversarial_probe"`; see `unsc_hf.objectives`. All run under the same projection.
        objective_beta, objective_gamma, retain_weight (`float`): of `"npo"` and `"simnpo"`, of `"simnpo"`, and of
            `"unsc_retain"`, `"unsc_distill"`, `"gradient_difference"` and `"scrub"`.
        retain_dropout (`bool`, defaults to `False`): retained rows are rehearsed with the model's dropout on, as when it was
            trained: rows that it knows by heart teach it nothing otherwise. Measured for single rows of texts alone.
        retain_mixing (`float`, defaults to `0.3`): for `"unsc_distill"`, how much of each rehearsed row comes from other retained rows of its
            batch, in [0, 1): that share of its tokens, or of its pixels' values. The model is then held to the original's answers beside
            the rows that both know by heart. Measured for texts alone; 0 rehearses the rows as they are.
        completion_only_loss (`bool`, defaults to `True`): for language models, forget the completions' tokens alone, not the
            prompts'.
        text_columns (`list[str]`, *optional*): column with the text, or the two of a pair; found by themselves when None.
        lora_freeze_a (`bool`, defaults to `False`): with adapters, keep A where it starts.

    Parameters that control forgetting in the features:
        feature_erasure (`str`, defaults to `"none"`): after unlearning, what a linear probe reads of the forgotten rows is erased
            in closed form from the head's input (`"head"`), or from every hidden state too (`"layers"`). It leaves the null
            space: the held-out leak says how far, and `max_leak` bounds it.
        erasure_strength (`float`, defaults to `0.35`): share of the difference between class means that is taken out; without
            retrained models to compare with, a share that leaves about as much as they have.
        feature_weight (`float`, defaults to `0.1`): of the features' part in `"whitened_means"`, `"whitened_covariances"` and
            `"adversarial_probe"`.
    """

    subspace_rule: str = field(
        default="energy", metadata={"help": "Rule for the kept directions.", "choices": list(RULES)}
    )
    energy: float = field(default=0.99, metadata={"help": "Share of the retained energy kept fixed, in (0, 1]."})
    subspace_rank: int | None = field(default=None, metadata={"help": "Kept directions for subspace_rule 'rank'."})
    subspace_ratio: float | None = field(
        default=None, metadata={"help": "Forgotten against retained energy for subspace_rule 'ratio'."}
    )
    subspace_merge: str = field(
        default="sum", metadata={"help": "Merge classes by sum of moments or by bases.", "choices": list(MERGES)}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Module names or endings to train; all protectable layers by default."}
    )
    null_space: str = field(
        default="retained",
        metadata={"help": "'retained' is UNSC; the others are controls.", "choices": list(NULL_SPACES)},
    )
    max_rows_per_class: int | None = field(
        default=10_000, metadata={"help": "Activation rows per class and layer in the statistics."}
    )
    max_samples_per_class: int | None = field(
        default=2_000, metadata={"help": "Data set rows per class read for the statistics."}
    )
    statistics_batch_size: int = field(default=128, metadata={"help": "Samples per forward pass of the statistics."})
    statistics_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of products in the statistics; sums are float64.",
            "choices": ["float32", "float64"],
        },
    )
    max_statistics_memory: str | None = field(
        default=None, metadata={"help": 'Limit on the extra memory of the statistics, such as "2GB".'}
    )
    sketch_size: int | None = field(
        default=None, metadata={"help": "Columns of the sketch of an input too wide for max_statistics_memory."}
    )
    pseudo_labels: str | None = field(
        default=None,
        metadata={
            "help": "How forgotten rows are re-labelled; by default soft for classes, matched for rows.",
            "choices": list(STRATEGIES),
        },
    )
    pseudo_label_temperature: float = field(
        default=0.5, metadata={"help": "Temperature of soft pseudo-labels; towards 0 they become top1."}
    )
    lr_doubling_steps: int | None = field(
        default=40, metadata={"help": "Steps in which the (otherwise constant) learning rate doubles."}
    )
    target_forget_accuracy: float | None = field(
        default=None,
        metadata={
            "help": "Stop when accuracy on the forget set is at or below this share; by default 0.002 for classes."
        },
    )
    max_leak: float | None = field(
        default=0.1, metadata={"help": "Budget on the held-out leak; the last state within it is kept."}
    )
    check_steps: int = field(default=5, metadata={"help": "Optimiser steps between two checks."})
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of rows held out for the checks."})
    max_validation_rows: int = field(default=1_000, metadata={"help": "At most this many rows are held out."})
    label_column: str | None = field(default=None, metadata={"help": "Column with class ids."})
    objective: str = field(
        default="unsc", metadata={"help": "What is minimised on the forget rows.", "choices": list(OBJECTIVES)}
    )
    objective_beta: float = field(default=0.1, metadata={"help": "Inverse temperature of npo and simnpo."})
    objective_gamma: float = field(default=0.0, metadata={"help": "Reward margin of simnpo."})
    retain_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of retained rows in unsc_retain, unsc_distill, gradient_difference and scrub."},
    )
    retain_dropout: bool = field(
        default=False, metadata={"help": "Rehearse retained rows with the model's dropout on, as in its training."}
    )
    retain_mixing: float = field(
        default=0.3, metadata={"help": "Share of each row that unsc_distill rehearses taken from other retained rows."}
    )
    completion_only_loss: bool = field(
        default=True, metadata={"help": "Language models: forget the completions' tokens alone, not the prompts'."}
    )
    text_columns: list[str] | None = field(default=None, metadata={"help": "Column with the text, or two for pairs."})

    lora_freeze_a: bool = field(
        default=False,
        metadata={"help": "With adapters: keep A where it starts, instead of projecting it after each step."},
    )

    feature_erasure: str = field(
        default="none",
        metadata={
            "help": "After unlearning, erase from the features what a linear probe reads: of the head's input, or of all layers.",
            "choices": list(ERASURES),
        },
    )
    erasure_strength: float = field(
        default=0.35,
        metadata={"help": "Share of the difference between class means that erasure takes out, in [0, 1]."},
    )
    feature_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the features in whitened_means, whitened_covariances, adversarial_probe."},
    )

    # TrainingArguments with other defaults.
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimiser; any torch optimiser keeps the promise."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    max_steps: int = field(default=400, metadata={"help": "Upper limit of optimiser steps; -1 uses num_train_epochs."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Forget rows per step and device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Rows per evaluation batch and device."})
    save_strategy: str = field(default="no", metadata={"help": "When checkpoints are written."})
    logging_steps: float = field(default=5, metadata={"help": "Steps between two log lines."})
    hub_strategy: str = field(default="end", metadata={"help": "Only 'end': half-unlearned weights are never pushed."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Handled by the trainer's collator."})

    @property
    def product_dtype(self) -> torch.dtype:
        """Precision in which the statistics multiply rows; see `statistics_dtype`."""
        if self.statistics_dtype is not None:
            return torch.float32 if self.statistics_dtype == "float32" else torch.float64
        coarse = self.subspace_rule == "energy" and self.energy <= _COARSE and self.subspace_merge == "sum"
        return torch.float32 if coarse else torch.float64

    def __post_init__(self) -> None:
        check_energy(self.energy)
        for argument, options in (
            ("subspace_rule", RULES),
            ("subspace_merge", MERGES),
            ("pseudo_labels", STRATEGIES),
            ("null_space", NULL_SPACES),
            ("objective", tuple(OBJECTIVES)),
            ("statistics_dtype", ("float32", "float64")),
            ("feature_erasure", ERASURES),
        ):
            if getattr(self, argument) is not None and getattr(self, argument) not in options:
                raise UNSCError(
                    f"{argument}: {getattr(self, argument)!r} does not exist; choose from {', '.join(options)}."
                )
        if self.subspace_rule == "rank" and self.subspace_rank is None:
            raise UNSCError("subspace_rank: not given; rule 'rank' needs the number of directions to keep.")
        if self.subspace_rule == "ratio" and self.subspace_ratio is None:
            raise UNSCError("subspace_ratio: not given; rule 'ratio' needs a positive number, such as 1.5.")
        if self.target_forget_accuracy is not None and not 0.0 <= self.target_forget_accuracy < 1.0:
            raise UNSCError(
                f"target_forget_accuracy: {self.target_forget_accuracy!r} is outside [0, 1); it is a share, not percent."
            )
        if self.max_leak is not None and not (math.isfinite(self.max_leak) and self.max_leak > 0):
            raise UNSCError(f"max_leak: {self.max_leak!r} is not a positive number; use None for no budget.")
        if not 0.0 <= self.erasure_strength <= 1.0:
            raise UNSCError(
                f"erasure_strength: {self.erasure_strength!r} is outside [0, 1]; it is a share, not percent."
            )
        if self.feature_erasure != "none" and self.lora_freeze_a:
            raise UNSCError("lora_freeze_a: erasure adds rows to A; use feature_erasure='none', or let A be trained.")
        for argument in ("objective_beta", "pseudo_label_temperature", "feature_weight"):
            if not getattr(self, argument) > 0:
                raise UNSCError(f"{argument}: {getattr(self, argument)!r} is not a positive number.")
        if not 0.0 <= self.retain_mixing < 1.0:
            raise UNSCError(f"retain_mixing: {self.retain_mixing!r} is outside [0, 1); it is a share, not percent.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise UNSCError(f"validation_fraction: {self.validation_fraction!r} is outside (0, 1).")
        for argument in (
            "check_steps",
            "lr_doubling_steps",
            "statistics_batch_size",
            "max_validation_rows",
            "max_rows_per_class",
            "max_samples_per_class",
            "sketch_size",
        ):
            value = getattr(self, argument)
            if value is not None and value < 1:
                raise UNSCError(f"{argument}: {value!r} is not a positive number.")
        if parse_size(self.max_statistics_memory, "max_statistics_memory") is None and self.sketch_size is not None:
            raise UNSCError(
                f"sketch_size: {self.sketch_size} given without max_statistics_memory, so no layer is sketched."
            )
        if self.hub_strategy != "end":
            raise UNSCError(
                f"hub_strategy: {self.hub_strategy!r} would push half-unlearned weights, and a repository's history keeps them; use 'end'."
            )
        for argument, reason in REFUSED.items():
            if getattr(self, argument):
                raise UNSCError(f"{argument}: not supported, {reason}.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else several processes on CPUs would each believe to be alone
        if self.fsdp and (self.bf16 or self.fp16):
            raise UNSCError(
                "fsdp: sharded weights are gathered in half precision under bf16 or fp16, and statistics would be read through them; "
                "leave both off, or use DDP (torchrun)."
            )
        super().__post_init__()


def check_fsdp(plugin: Any, objective: str, erasure: str = "none", strategy: str | None = None) -> None:
    """Refuse ways of sharding that the projection cannot follow, whether arguments or a launcher asked for them.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`.
        objective: name of the objective.
        erasure: `feature_erasure`.
        strategy: `pseudo_labels`.

    Raises:
        UNSCError: names the option and what to set instead.
    """
    state_dict = str(plugin.state_dict_type)
    reasons = {
        "fsdp_version": (plugin.fsdp_version != 2, "FSDP1 flattens weights into one vector; set it to 2"),
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "all but one process would start from empty weights, whose hash is not the model's; set it to false",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "it renames the layers; set it to false and use --activation_checkpointing",
        ),
        "fsdp_state_dict_type": (
            "FULL_STATE_DICT" not in state_dict,
            f"{state_dict} saves no model that from_pretrained can load; set it to FULL_STATE_DICT",
        ),
        "mixed_precision": (
            plugin.mixed_precision_policy is not None
            and plugin.mixed_precision_policy.param_dtype not in (None, torch.float32),
            "weights would be gathered in half precision, and statistics read through them; set it to 'no'",
        ),
    }
    for option, (given, reason) in reasons.items():
        if given:
            raise UNSCError(f"{option}: not supported with FSDP, {reason}.")
    if erasure != "none":
        raise UNSCError(
            "feature_erasure: not supported with FSDP, sharded weights cannot be folded into; use DDP (torchrun)."
        )
    if strategy == "left_out":
        raise UNSCError(
            "pseudo_labels: 'left_out' is not supported with FSDP, it reads an untrained model beside the sharded one; use DDP (torchrun)."
        )
    if OBJECTIVES[objective].keeps_original:
        raise UNSCError(
            f"objective: {objective!r} keeps a second, whole model beside the sharded one; use DDP (torchrun)."
        )
