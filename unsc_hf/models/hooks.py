"""Forward hooks that record layer inputs, and the modes in which a model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UNSCError
from ..utils.distributed import process, reshard
from ..utils.precision import full_float32
from .layers import ProtectedLayer

# Fields of a batch that the model does not read.
_NOT_INPUTS = ("labels", "pseudo_labels", "reference", "target_row", "retain")

_PIECES = 4  # a batch of texts is run in this many pieces


def model_inputs(batch: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """What the model reads of a batch, on a device if one is given."""
    inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
    return inputs if device is None else {name: value.to(device) for name, value in inputs.items()}


@contextmanager
def capture_inputs(
    layers: Sequence[ProtectedLayer],
    on_input: Callable[[ProtectedLayer, Tensor], None],
    strict: bool = True,
    at_source: bool = False,
) -> Iterator[None]:
    """Call `on_input(layer, x)` with each layer's input whenever the model runs inside the `with` block.

    The hooks are removed whatever happens.

    Args:
        strict: refuse layers that never ran, with a UNSCError at the end of the block: their statistics would be empty.
        at_source: take the input of a layer's `source`, before it is cast.
    """
    fired: set[str] = set()

    def hook(layer: ProtectedLayer, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fired.add(layer.name)
        on_input(layer, args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as stack:
        for layer in layers:
            module = layer.source if at_source and layer.source is not None else layer.module
            stack.callback(module.register_forward_pre_hook(partial(hook, layer), with_kwargs=True).remove)
        yield
    silent = [layer.name for layer in layers if layer.name not in fired]
    if strict and silent:
        raise UNSCError(f"target_modules: {len(silent)} layers never ran on the data, the first is {silent[0]!r}.")


def layer_outputs(model: nn.Module, layers: Sequence[ProtectedLayer], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs of layers on one batch by name, on the CPU, shaped as the model gives them; padding counts too.

    A LoRA factor stands for the layer it belongs to. Of a layer that runs several times the last output is kept.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        outputs[name] = (output[0] if isinstance(output, tuple) else output).detach().cpu()

    with ExitStack() as stack:
        for layer in layers:
            module = layer.module if layer.source is None else layer.source
            stack.callback(module.register_forward_hook(partial(keep, layer.name)).remove)
        model(**inputs)
    return outputs


def quiet(model: nn.Module) -> None:
    """Switch dropout off and batch norm to its running statistics, but leave activation checkpointing on.

    Modules that checkpoint look at their own `training` flag, so only those stay in training mode.
    """
    set_modes({module: bool(vars(module).get("gradient_checkpointing")) for module in model.modules()})


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Training or eval mode of single modules."""
    for module, training in modes.items():
        if module.training != training:
            module.training = training


@contextmanager
def evaluation_mode(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Eval mode and full float32 inside the block, by default without gradients. Every module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with full_float32(), torch.set_grad_enabled(gradients):
            yield
    finally:
        reshard(model)
        set_modes(modes)


def row_mask(x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Which rows of a (batch, tokens, width) input are real tokens, bool (batch * tokens,); None means all."""
    if attention_mask is None or attention_mask.dim() != 2 or x.dim() != 3 or x.shape[:2] != attention_mask.shape:
        return None
    return attention_mask.reshape(-1).bool()


def pool(state: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens (batch, tokens, width) or positions (batch, width, height, breadth)."""
    if state.dim() == 4:
        return state.mean((2, 3))
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(1)
    return (state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class Trace:
    """What one forward pass of a small batch shows about the layers."""

    leaders: dict[str, str]  # by layer name, the first layer that reads the same tensor (possibly itself)
    rows_per_sample: dict[str, float]  # activation rows by layer name
    silent: tuple[str, ...]  # layers that did not run


def trace_layers(layers: Sequence[ProtectedLayer], forward: Callable[[], Any], batch_size: int) -> Trace:
    """Run `forward` once and find which layers run and which read the very same tensor (q, k and v).

    Inputs are compared by address, shape, strides and version. They are kept alive until the pass has ended, so that no
    address is used twice.
    """
    seen: dict[str, list[tuple[Any, ...]]] = {}
    rows: dict[str, float] = {}
    alive: list[Tensor] = []

    def remember(layer: ProtectedLayer, x: Tensor) -> None:
        alive.append(x)
        version = 0 if x.is_inference() else x._version
        key = (x.data_ptr(), tuple(x.shape), x.stride(), version, layer.geometry)
        seen.setdefault(layer.name, []).append(key)
        rows[layer.name] = rows.get(layer.name, 0.0) + layer.rows(x[:1]).shape[1] * x.shape[0] / batch_size

    with capture_inputs(layers, remember, strict=False, at_source=True):
        forward()
    first: dict[tuple[Any, ...], str] = {}
    ran = [layer.name for layer in layers if layer.name in seen]
    leaders = {name: first.setdefault(tuple(seen[name]), name) for name in ran}
    return Trace(leaders, rows, tuple(layer.name for layer in layers if layer.name not in seen))


def pieces(inputs: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Split a batch of texts by length where that saves padding; yields the sample numbers and inputs of each piece."""
    mask = inputs.get("attention_mask")
    texts = mask is not None and mask.dim() == 2 and len(mask) >= 2 * _PIECES and process()[1] == 1
    if mask is None or not texts or mask.device.type != "cpu" or bool(mask.all()):
        yield torch.arange(len(next(iter(inputs.values())))), inputs
        return
    for rows in mask.sum(1).argsort(stable=True).chunk(_PIECES):
        end = int(mask[rows].any(0).nonzero().max()) + 1
        piece = {
            name: value[rows][:, :end] if value.shape[:2] == mask.shape else value[rows]
            for name, value in inputs.items()
        }
        yield rows, piece
