"""What erasure reads of a model: on which rows, in which place, and which layer writes it.

A place is a hidden state, or the input of the head. A reading gives one row for each sample of a classifier: the head's
input as it is, or a hidden state as its mean over real tokens or positions, as the probe audit takes it. Of a language
model it gives one row for each answer token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import UNSCConfig
from ..data.dialogues import IGNORED
from ..data.inputs import default_collator, prepare_dataset
from ..data.selection import evenly_spaced
from ..errors import UNSCError
from ..models.hooks import NOT_INPUTS, capture_inputs, evaluation_mode, pool
from ..models.layers import ProtectedLayer, RowGeometry
from ..models.outputs import find_head
from ..tasks import Task
from .closed_form import Pair, differences, shared_pairs

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]

_FORGOTTEN_ROWS = 600  # forgotten rows that are read, and retained ones of a language model
_FORGOTTEN_ROWS_PER_CLASS = 100  # the least limit for a class, where many classes are forgotten
_ROWS_PER_CLASS = 150  # retained rows of each class that forgotten rows are re-labelled to
_OTHER_ROWS = 300  # retained rows of all other classes together: they count in the leak
_FEW_ROWS = 20  # with fewer retained rows the mean of a class is uncertain


@dataclass(frozen=True)
class FeatureRows:
    """The rows of a request, and what makes batches of them."""

    task: Task  #: knows the classes of rows
    args: UNSCConfig  #: says what to erase, and on which device
    forget: Dataset
    retain: Dataset
    held_out: Dataset  #: forget rows held out for validation
    processor: Any  #: tokenizer or image processor of the model, None where rows need none
    prepare: Callable[[Dataset], Any]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def batches(self, rows: Dataset) -> list[Batch]:
        """Rows in batches on the device, in their order."""
        size, device = self.args.per_device_eval_batch_size, self.args.device
        loader = DataLoader(self.prepare(rows), size, collate_fn=self.collate, generator=torch.Generator())
        return [{name: value.to(device) for name, value in batch.items()} for batch in loader]

    def read_by(self, model: nn.Module, processor: Any) -> FeatureRows:
        """The same rows as another model reads them, with its own tokenizer or image processor.

        Rows that are no raw images or texts stay as they are.
        """
        if self.task.prepare(self.held_out).format["type"] != "custom":
            return self

        def prepare(rows: Dataset) -> Dataset:
            return prepare_dataset(rows, processor, model, self.args.label_column, self.args.text_columns)

        return replace(self, processor=processor, prepare=prepare, collate=default_collator(processor))


@dataclass(frozen=True)
class ErasureRows:
    """The rows that erasure reads, in batches on the model's device."""

    forgotten: Sequence[Batch]
    retained: Sequence[Batch]
    own: Tensor  #: class of each forgotten reading row, (rows,)
    relabelled: Tensor  #: the class that it is re-labelled to, (rows,)
    labels: Tensor  #: classes of the retained reading rows, (rows,)
    pairs: Sequence[Pair]  #: whose means are brought together, see `shared_pairs`
    answers: bool = False  #: whether rows are the answer tokens of a language model

    def differences(self, forgotten: Tensor, retained: Tensor) -> Tensor:
        """Of class means (width, pairs), of what was read of the rows, (rows, width) each."""
        return differences(forgotten, self.own, self.relabelled, retained, self.labels, self.pairs)


def erasure_rows(rows: FeatureRows, pseudo_labels: Tensor | None) -> ErasureRows:
    """Choose evenly spaced rows to forget and to keep. None of them is held out.

    Pseudo-labels are ids (forget rows,) or distributions (forget rows, classes); None for a language model. UNSCError
    when no class has two rows of either kind.
    """
    own = rows.task.strata(rows.forget)
    classes = np.unique(own)
    limit = max(_FORGOTTEN_ROWS // len(classes), _FORGOTTEN_ROWS_PER_CLASS)
    chosen = np.sort(np.concatenate([evenly_spaced(np.flatnonzero(own == c), limit) for c in classes]))
    forgotten = rows.batches(rows.forget.select(chosen))
    if pseudo_labels is None:
        return _answer_rows(rows, forgotten)
    new = pseudo_labels[torch.from_numpy(chosen)]
    relabelled = new if new.dim() == 1 else new.argmax(1)
    mine, labels = torch.from_numpy(own[chosen]), rows.task.strata(rows.retain)
    pairs = shared_pairs(mine, relabelled, torch.from_numpy(labels))
    alone = sorted(set(classes.tolist()) - {c for c, _ in pairs})
    if alone:
        logger.warning(
            "Class %s is not erased: fewer than two of its rows have the same new label, so there is no mean to move.",
            alone[0],
        )
    shared = sorted({k for _, k in pairs})
    of_shared = [evenly_spaced(np.flatnonzero(labels == k), _ROWS_PER_CLASS) for k in shared]
    few = [k for k, part in zip(shared, of_shared, strict=True) if len(part) < _FEW_ROWS]
    if few:
        logger.warning("Class %s has fewer than %d retained rows: its mean is uncertain.", few[0], _FEW_ROWS)
    others = evenly_spaced(np.flatnonzero(~np.isin(labels, shared)), _OTHER_ROWS)
    kept = np.sort(np.concatenate([*of_shared, others]))
    retained = rows.batches(rows.retain.select(kept))
    return ErasureRows(forgotten, retained, mine, relabelled, torch.from_numpy(labels[kept]), pairs)


def _answer_rows(rows: FeatureRows, forgotten: Sequence[Batch]) -> ErasureRows:
    """Rows of a language model: all answer tokens are one group."""
    kept = evenly_spaced(np.arange(len(rows.retain)), _FORGOTTEN_ROWS)
    retained = rows.batches(rows.retain.select(kept))
    group, labels = (
        torch.zeros(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in part), dtype=torch.long)
        for part in (forgotten, retained)
    )
    return ErasureRows(forgotten, retained, group, group, labels, shared_pairs(group, group, labels), True)


@dataclass(frozen=True)
class Reading:
    """One place to read."""

    state: int | None  #: index of a hidden state, None for the head's input
    head: ProtectedLayer
    answers: bool = False  #: whether rows are the answer tokens of a language model

    @property
    def name(self) -> str:
        return "head" if self.state is None else f"layer_{self.state:02d}"

    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Run the model on a batch, and read: (rows, width), with the graph where gradients are on.

        UNSCError for hidden states that the model does not return, or a head that reads several rows of a sample.
        """
        return read_all(model, [self], batch)[0]


def read_all(model: nn.Module, readings: Sequence[Reading], batch: Mapping[str, Any]) -> list[Tensor]:
    """Several readings of one head from a single forward pass; see `Reading.rows`."""
    seen: list[Tensor] = []
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    if any(reading.state is not None for reading in readings):
        inputs["output_hidden_states"] = True
    with capture_inputs([readings[0].head], lambda _, x: seen.append(x)):
        states = getattr(model(**inputs), "hidden_states", None) or ()

    def rows(reading: Reading) -> Tensor:
        if reading.state is not None and reading.state >= len(states):
            raise UNSCError(
                f"features: {type(model).__name__} returns {len(states)} hidden states, number {reading.state} "
                "was asked for; use 'head'."
            )
        state = seen[-1] if reading.state is None else states[reading.state]
        if reading.answers:
            return answer_rows(state, batch)
        if reading.state is not None:
            return pool(state, batch.get("attention_mask"))
        if state.dim() != 2:
            raise UNSCError(
                f"features: the head reads an input of shape {tuple(state.shape)}, expected (batch, width): "
                "one row for each sample."
            )
        return state

    return [rows(reading) for reading in readings]


def read_rows(model: nn.Module, readings: Sequence[Reading], batches: Sequence[Batch]) -> list[Tensor]:
    """Several readings of all batches, (rows, width) each, float32 on the CPU."""
    with evaluation_mode(model):
        return _joined([read_all(model, readings, batch) for batch in batches])


def _joined(batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What was read of each batch, joined over batches, float32 on the CPU."""
    return [torch.cat([part.float().cpu() for part in parts]) for parts in zip(*batches, strict=True)]


def answer_rows(x: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Rows of (batch, tokens, width) that predict a labelled token."""
    return x[:, :-1][batch["labels"][:, 1:] != IGNORED]


def find_readings(model: nn.Module, layers: bool, answers: bool, batch: Mapping[str, Any]) -> list[Reading]:
    """The head's input, and with `layers` every hidden state before it, which a small batch shows.

    The embeddings are left out: what pixels and words give away by themselves is nothing that the model has learned.
    `answers` says that the model is a causal language model. UNSCError where there is no linear head or hidden state.
    """
    network: Any = model
    if answers:
        name, module = "head", network.get_output_embeddings()
    else:
        name, module = find_head(model, int(network.config.num_labels))
    head = ProtectedLayer(name, module, RowGeometry("linear", 1, module.weight.shape[1]))
    readings = [Reading(None, head, answers)]
    if not layers:
        return readings
    with evaluation_mode(model):
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
    if not states:
        raise UNSCError(f"features: {type(model).__name__} returns no hidden states; use 'head' instead of 'layers'.")
    return [*(Reading(i, head, answers) for i in range(1, len(states))), *readings]


def find_writer(
    model: nn.Module, layers: Sequence[ProtectedLayer], reading: Reading, batch: Mapping[str, Any]
) -> ProtectedLayer | None:
    """The last of `layers` to run of those that the reading depends on; None when it depends on none (embeddings).

    `layers` are modules that may be changed (a LoRA layer as a whole, not its factor); the head is left out.
    """
    order: list[ProtectedLayer] = []
    outputs: list[Tensor] = []

    def hook(layer: ProtectedLayer, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        order.append(layer)
        outputs.append(output if output.requires_grad else output.detach().requires_grad_())
        return outputs[-1]

    with ExitStack() as stack, evaluation_mode(model, gradients=True):
        for layer in layers:
            if layer.name != reading.head.name:
                stack.callback(layer.module.register_forward_hook(partial(hook, layer)).remove)
        read = reading.rows(model, batch).sum()
        if not outputs or not read.requires_grad:
            return None
        gradients = torch.autograd.grad(read, outputs, allow_unused=True)
    reached = [layer for layer, gradient in zip(order, gradients, strict=True) if gradient is not None]
    return reached[-1] if reached else None


def read_writer(
    model: nn.Module, writer: ProtectedLayer, reading: Reading, batches: Sequence[Batch]
) -> tuple[Tensor, Tensor]:
    """A reading (rows, width), and the input rows of its writer (rows, in), of all batches, in float32 on the CPU.

    The inputs are averages over positions, weighted by how much the reading depends on each.
    """
    parts = []
    for batch in batches:
        with _cut_behind(model, writer) as (inputs, outputs):
            read = reading.rows(model, batch)
            if reading.answers:
                x = answer_rows(inputs[-1], batch)
            else:
                # Which positions count, and how much: one backward pass from the reading to the writer.
                direction = torch.randn(read.shape[1], generator=torch.Generator().manual_seed(0)).to(read)
                slope = _slope(writer, (read @ direction).sum(), outputs[-1])
                x = _weighted(writer, inputs[-1], slope.norm(dim=2))
        parts.append((read.detach(), x))
    features, rows = _joined(parts)
    return features, rows


def jacobian(model: nn.Module, writer: ProtectedLayer, reading: Reading, batch: Mapping[str, Any]) -> Tensor:
    """Derivative of the mean feature by a constant added to the writer's output, float64, (width, out)."""
    with _cut_behind(model, writer) as (_, outputs):
        means = reading.rows(model, batch).mean(0)
        return torch.stack([_slope(writer, mean, outputs[-1]).sum((0, 1)) for mean in means]).double().cpu()


@contextmanager
def _cut_behind(model: nn.Module, layer: ProtectedLayer) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Inside, gradients go back to the output of a layer and no further. Yields its inputs and outputs of each pass."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(args[0].detach())
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    with ExitStack() as stack, evaluation_mode(model, gradients=True):
        stack.callback(layer.module.register_forward_hook(hook).remove)
        yield inputs, outputs


def _slope(layer: ProtectedLayer, value: Tensor, output: Tensor) -> Tensor:
    """Derivative of a number by a layer's output, (batch, positions, out)."""
    (slope,) = torch.autograd.grad(value, output, retain_graph=True)
    if layer.geometry.kind == "conv2d":
        return slope.flatten(2).transpose(1, 2)
    return slope.reshape(len(slope), -1, slope.shape[-1])


def _weighted(writer: ProtectedLayer, x: Tensor, weights: Tensor) -> Tensor:
    """Input rows of each sample, averaged with weights (batch, positions): (batch, in)."""
    rows = writer.rows(x)[0].reshape(len(x), weights.shape[1], -1)
    shares = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.einsum("bp,bpd->bd", shares, rows)
