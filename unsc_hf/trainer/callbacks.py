"""Callbacks that keep weight changes inside the null space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..nullspace.projection import NullSpaceProjection


class ProjectionCallback(TrainerCallback):
    """W <- W_0 + (W - W_0) P after every optimiser step: momentum, decay and rescaling cannot leave the null space."""

    def __init__(self, projection: NullSpaceProjection) -> None:
        self.projection = projection

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.projection.project_displacements()


class EpochCallback(TrainerCallback):
    """Tells the training rows which epoch begins: `Trainer` tells samplers, and data sets not in every case."""

    def __init__(self, begin: Callable[[int], None]) -> None:
        self.begin = begin

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin(int((state.epoch or 0.0) + 1e-6))
