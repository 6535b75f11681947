"""Callbacks that keep weight changes inside the null space."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UNSCError
from ..models.hooks import model_inputs
from ..nullspace.api import Attachment, NullSpace
from ..nullspace.projection import NullSpaceProjection


class ProjectionCallback(TrainerCallback):
    """W <- W_0 + (1 - decay) (W - W_0) P after every optimiser step, whatever the optimiser did.

    The decay falls as the learning rate rises above its first value. So a displacement can be longer the longer it is
    looked for, and the smallest that forgets is met first.
    """

    def __init__(self, projection: NullSpaceProjection, decay: float = 0.0) -> None:
        self.projection, self.decay = projection, decay

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        group = kwargs["optimizer"].param_groups[0]
        first, rate = group.get("initial_lr", group["lr"]), group["lr"]
        self.projection.project_displacements(decay=self.decay * min(1.0, first / rate if rate > 0 else 1.0))


class EpochCallback(TrainerCallback):
    """Tells the training rows which epoch begins: `Trainer` tells samplers, and data sets not in every case."""

    def __init__(self, begin: Callable[[int], None]) -> None:
        self.begin = begin

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin(int((state.epoch or 0.0) + 1e-6))


class NullSpaceCallback(TrainerCallback):
    """Protects any `transformers.Trainer`, TRL's too: outputs on some rows stay while it trains on others.

    When training begins, the rows are read once and everything that cannot be protected (biases, norms, embeddings) is
    frozen. From then on gradients and weight changes are confined to the rows' null space; see `NullSpace`.

    Example::

        trainer = Trainer(model, args, train_dataset=rows, callbacks=[NullSpaceCallback(rows_to_keep, energy=0.99)])

    Args:
        retain_dataset: rows to keep, prepared like the trainer's own.
        energy: share of their energy that is kept, in (0, 1].
        target_modules: layers to train; see `models.layers.find_layers`. None means all.
        batch_size: rows read at once.

    Attributes:
        space: the `NullSpace`, from the beginning of training on; `space.leak(batches)` measures it.

    Raises:
        UNSCError: when training begins, for rows without batches, and on several processes.
    """

    space: NullSpace

    def __init__(
        self,
        retain_dataset: Any,
        energy: float = 0.99,
        *,
        target_modules: str | Sequence[str] | None = None,
        batch_size: int = 128,
    ) -> None:
        self.retain_dataset, self.energy = retain_dataset, energy
        self.target_modules, self.batch_size = target_modules, batch_size
        self._attached: list[Attachment] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise UNSCError(
                "NullSpaceCallback: got several processes, which may not freeze weights after they are wrapped; use "
                "one, or call NullSpace.fit and freeze_others before the trainer is made, and attach its optimizer."
            )
        model = kwargs["model"]
        batches = self._batches(model, kwargs["train_dataloader"].collate_fn, args.device)
        self.space = NullSpace.fit(model, batches, energy=self.energy, target_modules=self.target_modules)
        self.space.freeze_others()
        self._attached = [self.space.attach(kwargs["optimizer"])]

    def _batches(self, model: nn.Module, collate_fn: Any, device: torch.device) -> Iterator[dict[str, Any]]:
        """Batches of what the model reads."""
        network = model.get_base_model() if isinstance(model, PeftModel) else model
        # Of the class, since trainers put other functions in place of a model's own.
        names = set(inspect.signature(type(network).forward).parameters) | {"label", "label_ids"}

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = collate_fn([{k: v for k, v in row.items() if k in names} for row in rows])
            return batch

        generator = torch.Generator()  # leaves the global random state alone
        for batch in DataLoader(self.retain_dataset, self.batch_size, collate_fn=collate, generator=generator):
            yield model_inputs(batch, device)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for attachment in self._attached:
            attachment.remove()
            self.space.project_displacements(torch.float64)
        self._attached = []
