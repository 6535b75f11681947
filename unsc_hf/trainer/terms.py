"""What an objective reads of a training batch: forget rows with their targets, and whatever it names as needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UNSCError
from ..models.hooks import model_inputs
from ..models.layers import decoder_block
from ..objectives import OBJECTIVES, Terms
from ..objectives.terms import HiddenStates
from .goals import ForgettingGoal


class TermsProvider:
    """Makes the `Terms` of a batch for one objective.

    Attributes:
        original: a frozen copy of the original model for objectives that compare with it, else the model itself.
    """

    def __init__(self, model: nn.Module, goal: ForgettingGoal) -> None:
        """`model` is the model before its first step."""
        self.objective, self.options = OBJECTIVES[goal.args.objective], goal.args.objective_options
        self.task, self.goal = goal.task, goal
        self.original = model
        if self.objective.keeps_original:
            self.original = copy.deepcopy(model).requires_grad_(False)
            self.original.eval()
        self._blocks: tuple[nn.Module, nn.Module] | None = None
        if "hidden" in self.objective.needs:
            if self.task.label_column is not None:
                raise UNSCError(
                    f"objective: {self.objective.name!r} reads hidden states of answer tokens, which a classifier does "
                    "not have; choose another."
                )
            layer = int(self.options["layer"])
            self._blocks = (decoder_block(model, layer), decoder_block(self.original, layer))

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Terms, Tensor]:
        """Terms of a batch of `ModelReader.collate`, and the model's logits on its forget rows."""
        inputs, true, made = model_inputs(batch), batch["labels"], batch["pseudo_labels"]
        with self._watched(0) as forget_states:
            outputs = self.task.logits(model, inputs)
        targets = self.goal.current_targets(made, batch["target_row"]) if "target_row" in batch else made
        logits, labels, targets, samples = self.task.positions(outputs, true, targets)
        more: dict[str, Any] = {}
        if "teacher" in self.objective.needs:
            more["teacher"] = self.task.positions(self._taught(inputs), true, made)[0]
        if self.objective.rehearses:
            with self._watched(0) as states:
                more.update(self._retained(model, batch["retain"]))
            if self._blocks is not None:
                more["hidden"] = self._hidden(forget_states, true, states, batch["retain"])
        if "refusal" in self.objective.needs:
            more.update(self._refusals(model, inputs, true))
        return Terms(logits, labels, targets, samples, batch["reference"], **more), outputs

    @contextmanager
    def _watched(self, which: int) -> Iterator[list[Tensor]]:
        """Outputs of the decoder block of the model (0) or of the original (1) while they run, if they are needed."""
        states: list[Tensor] = []
        if self._blocks is None:
            yield states
            return

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        handle = self._blocks[which].register_forward_hook(keep)
        try:
            yield states
        finally:
            handle.remove()

    def _hidden(
        self, forget: list[Tensor], labels: Tensor, retain: list[Tensor], batch: Mapping[str, Tensor]
    ) -> HiddenStates:
        """Hidden states of the labelled tokens themselves, as RMU takes them."""
        with self._watched(1) as original:
            self._taught(model_inputs(batch))
        labelled: list[tuple[Tensor, Tensor]] = []
        for states, true in ((forget[-1], labels), (retain[-1], batch["labels"])):
            chosen = true != -100
            samples = torch.arange(len(true), device=true.device)[:, None].expand_as(true)[chosen]
            labelled.append((states[chosen], samples))
        return HiddenStates(*labelled[0], *labelled[1], original[-1][batch["labels"] != -100])

    def _refusals(self, model: nn.Module, inputs: dict[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Log-likelihoods of a refusal in place of each forget row's answer."""
        inputs, labels = self.task.refusals(inputs, answers)
        both = {"refusal": self.task.logits(model, inputs), "refusal_reference": self._taught(inputs)}
        result = {}
        for name, logits in both.items():
            flat = self.task.outputs(logits, labels)
            each = -nn.functional.cross_entropy(flat.logits.float(), flat.labels, reduction="none")
            result[name] = each.new_zeros(len(labels)).index_add(0, flat.need_samples(), each)
        return result

    def loss(self, terms: Terms) -> Tensor:
        """The objective's scalar loss."""
        return self.objective.loss(terms, self.options)

    def _taught(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.task.logits(self.original, inputs)

    def _retained(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an objective reads of a batch of retained rows, by the names in `Terms`."""
        inputs = model_inputs(batch)
        kept = self.task.outputs(self.task.logits(model, inputs), batch["labels"])
        loss = nn.functional.cross_entropy(kept.logits.float(), kept.labels)
        terms = {"retain_logits": kept.logits, "retain_loss": loss}
        if "retain_teacher" in self.objective.needs:
            terms["retain_teacher"] = self.task.outputs(self._taught(inputs), batch["labels"]).logits
        return terms
