"""What a probe reads of a model: the input of its head, or a hidden state; and which layer writes it.

A reading gives one row per sample of a classifier (the head's input as it is; a hidden state as its mean over real tokens or
positions, as the probe audit takes it), and one row per answer token of a language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UNSCError
from ..models.head import find_head
from ..models.hooks import NOT_INPUTS, capture_inputs, evaluation_mode
from ..models.layers import ProtectedLayer, RowGeometry
from .replay import Replay

IGNORED = -100


@dataclass(frozen=True)
class Reading:
    """One place to read.

    Attributes:
        state: index of a hidden state, None for the head's input.
        head: the head.
        answers: whether rows are the answer tokens of a language model.
        replay: while one layer changes, what the blocks before it gave; None runs all of them.
    """

    state: int | None
    head: ProtectedLayer
    answers: bool = False
    replay: Replay | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return "head" if self.state is None else f"layer_{self.state:02d}"

    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Run the model on a batch, and read: (rows, width), with the graph where gradients are on.

        Raises:
            UNSCError: hidden states that the model does not return, or a head that reads several rows of a sample.
        """
        return read_all(model, [self], batch)[0]

    def of_states(self, model: nn.Module, states: Sequence[Tensor] | None, batch: Mapping[str, Any]) -> Tensor:
        """The reading from the model's hidden states; see `rows`."""
        assert self.state is not None
        if states is None or not self.state < len(states):
            raise UNSCError(
                f"features: {type(model).__name__} returns {0 if states is None else len(states)} hidden states, number {self.state} "
                "was asked for; use 'head'."
            )
        state = states[self.state]
        return self.answer_rows(state, batch) if self.answers else pooled(state, batch.get("attention_mask"))

    def of_head(self, x: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The reading from what the head was given; see `rows`."""
        if self.answers:
            return self.answer_rows(x, batch)
        if x.dim() != 2:
            raise UNSCError(
                f"features: the head reads an input of shape {tuple(x.shape)}, expected (batch, width): one row for each sample."
            )
        return x

    @staticmethod
    def answer_rows(x: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Rows of (batch, tokens, width) that predict a labelled token."""
        return x[:, :-1][batch["labels"][:, 1:] != IGNORED]


def read_all(model: nn.Module, readings: Sequence[Reading], batch: Mapping[str, Any]) -> list[Tensor]:
    """Several readings of one head from a single forward pass; see `Reading.rows`. A single one may replay."""
    seen: list[Tensor] = []
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    if any(reading.state is not None for reading in readings):
        inputs["output_hidden_states"] = True
    replay = readings[0].replay if len(readings) == 1 else None
    with (
        nullcontext() if replay is None else replay(batch),
        capture_inputs([readings[0].head], lambda _, x: seen.append(x)),
    ):
        states = getattr(model(**inputs), "hidden_states", None)
    return [
        reading.of_head(seen[-1], batch) if reading.state is None else reading.of_states(model, states, batch)
        for reading in readings
    ]


def pooled(state: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens (batch, tokens, width) or positions (batch, width, height, breadth)."""
    if state.dim() == 4:
        return state.mean((2, 3))
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(1)
    return (state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def find_readings(model: nn.Module, layers: bool, answers: bool, batch: Mapping[str, Any]) -> list[Reading]:
    """The head's input, and with `layers` every hidden state before it but the embeddings: what pixels and words give away by
    themselves is nothing that the model has learned.

    Args:
        model: a classifier or a causal language model.
        answers: whether it is the latter.
        batch: a small batch, to see how many hidden states there are.

    Raises:
        UNSCError: no linear head, or hidden states that the model does not return.
    """
    if answers:
        module = model.get_output_embeddings()  # type: ignore[operator]
        head = ProtectedLayer("head", module, RowGeometry("linear", 1, module.weight.shape[1]))
    else:
        name, module = find_head(model, int(model.config.num_labels))  # type: ignore[union-attr, arg-type]
        head = ProtectedLayer(name, module, RowGeometry("linear", 1, module.in_features))
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

    Args:
        layers: modules that may be changed (a LoRA layer as a whole, not its factor); the head is left out.
        batch: a small batch.
    """
    order: list[ProtectedLayer] = []
    outputs: list[Tensor] = []

    def watch(layer: ProtectedLayer, stack: ExitStack) -> None:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            order.append(layer)
            outputs.append(output if output.requires_grad else output.detach().requires_grad_())
            return outputs[-1]

        stack.callback(layer.module.register_forward_hook(hook).remove)

    with ExitStack() as stack, evaluation_mode(model, gradients=True):
        for layer in layers:
            if layer.name != reading.head.name:
                watch(layer, stack)
        read = reading.rows(model, batch).sum()
        if not outputs or not read.requires_grad:
            return None
        found = torch.autograd.grad(read, outputs, allow_unused=True)
    reached = [layer for layer, gradient in zip(order, found, strict=True) if gradient is not None]
    return reached[-1] if reached else None


@dataclass(frozen=True)
class Written:
    """A reading, and what its writer read for it.

    Attributes:
        features: the reading, (rows, width).
        inputs: input rows of the writer, averaged over positions as much as the reading depends on each, (rows, in).
        jacobian: derivative of the mean feature by a constant added to the writer's output, (width, out); None if not asked for.
    """

    features: Tensor
    inputs: Tensor
    jacobian: Tensor | None


def read_writer(
    model: nn.Module, writer: ProtectedLayer, reading: Reading, batch: Mapping[str, Any], jacobian: bool = False
) -> Written:
    """One forward pass of a batch, cut open at the output of `writer`.

    Raises:
        UNSCError: as `Reading.rows`.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(args[0].detach())
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = writer.module.register_forward_hook(hook)
    try:
        with evaluation_mode(model, gradients=True):
            read = reading.rows(model, batch)
            z = outputs[-1]
            if reading.answers:
                x = reading.answer_rows(inputs[-1], batch)
            else:
                # Which positions count, and how much: one backward pass of the tail behind the writer.
                direction = torch.randn(read.shape[1], generator=torch.Generator().manual_seed(0)).to(read)
                (slope,) = torch.autograd.grad((read @ direction).sum(), z, retain_graph=jacobian)
                x = _weighted(writer, inputs[-1], _by_position(writer, slope).norm(dim=2))
            slopes = None
            if jacobian:
                means = read.mean(0)
                rows = [
                    _by_position(writer, torch.autograd.grad(mean, z, retain_graph=True)[0]).sum((0, 1))
                    for mean in means
                ]
                slopes = torch.stack(rows).double().cpu()
    finally:
        handle.remove()
    return Written(read.detach().float().cpu(), x.float().cpu(), slopes)


def _by_position(writer: ProtectedLayer, output: Tensor) -> Tensor:
    """An output of a layer as (batch, positions, out)."""
    if writer.geometry.kind == "conv2d":
        return output.flatten(2).transpose(1, 2)
    return output.reshape(len(output), -1, output.shape[-1])


def _weighted(writer: ProtectedLayer, x: Tensor, weights: Tensor) -> Tensor:
    """Input rows of each sample, averaged with weights (batch, positions): (batch, in)."""
    rows = writer.rows(x)[0].reshape(len(x), weights.shape[1], -1)
    shares = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.einsum("bp,bpd->bd", shares, rows)
