"""Which layers can be protected, and how their inputs become activation rows.

A layer y = W x + b can be protected when its weight is a plain matrix that right-multiplies rows of its input:
`nn.Linear`, transformers' `Conv1D` (weight stored transposed) and `nn.Conv2d` (rows are the patches the kernel sees).
In a PEFT LoRA model the rows feed the `lora_A` factor, which is itself one of these modules.
Everything else (biases, norms, embeddings, bare parameters, tied weights, fused experts) is frozen, and reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UNSCError, closest

ADAPTER = "default"  # the name that PEFT gives the only adapter


@dataclass(frozen=True)
class RowGeometry:
    """How an input tensor is cut into rows; two modules share statistics only if input and geometry are equal."""

    kind: str  #: "linear" or "conv2d"
    groups: int
    width: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  #: left, right, top, bottom
    padding_mode: str = "zeros"
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True, eq=False)
class ProtectedLayer:
    """One protectable module."""

    name: str  #: in the base model: a LoRA factor has its layer's, so that statistics of a model serve adapters too
    module: nn.Module
    geometry: RowGeometry  #: how its input becomes rows
    path: str = ""  #: the module's own name in `model.named_modules()`, where it differs
    source: nn.Module | None = None  #: what reads the same input before a cast: for a LoRA factor its layer

    @property
    def weight(self) -> nn.Parameter:
        """The live parameter. It is looked up at each use because sharding replaces parameter objects."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def weight_name(self) -> str:
        return f"{self.path or self.name}.weight"

    @property
    def stored_by_rows(self) -> bool:
        """Whether a shard of the stored weight's first dimension is a set of whole rows of the matrix."""
        return self.geometry.groups == 1 and not isinstance(self.module, Conv1D)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """`weight`, its gradient or a shard of its rows as a view that maps rows to outputs, (groups, out / groups,
        width)."""
        if isinstance(self.module, Conv1D):
            return weight.t().unsqueeze(0)
        return weight.reshape(self.geometry.groups, weight.shape[0] // self.geometry.groups, self.geometry.width)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `as_matrix`: the parameter's own shape."""
        if isinstance(self.module, Conv1D):
            return matrix.squeeze(0).t()
        return matrix.reshape(matrix.shape[0] * matrix.shape[1], *self.weight.shape[1:])

    def rows(self, x: Tensor) -> Tensor:
        """Rows of one input tensor, shape (groups, n, width): one row per token, or per position of the kernel.

        For a convolution the rows are the patches in `F.unfold`'s order, sample after sample, with the layer's own
        padding, stride and dilation.
        """
        g = self.geometry
        if g.kind == "linear":
            return x.reshape(1, -1, g.width)
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        mode = "constant" if g.padding_mode == "zeros" else g.padding_mode
        padded = F.pad(batched, g.padding, mode=mode) if any(g.padding) else batched
        patches = F.unfold(padded, g.kernel_size, dilation=g.dilation, stride=g.stride)  # (b, channels * kh * kw, n)
        b, _, n = patches.shape
        return patches.reshape(b, g.groups, g.width, n).permute(1, 0, 3, 2).reshape(g.groups, b * n, g.width)


def _conv_padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Padding of a convolution in F.pad's order. Like torch, 'same' puts an odd element on the right and bottom."""
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        total_h, total_w = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return (total_w // 2, total_w - total_w // 2, total_h // 2, total_h - total_h // 2)
    pad_h, pad_w = (int(p) for p in conv.padding)
    return (pad_w, pad_w, pad_h, pad_h)


def row_geometry(module: nn.Module) -> RowGeometry | None:
    """Geometry of a module whose weight can be protected, or None."""
    if "weight" not in dict(module.named_parameters(recurse=False)):  # parametrised, quantised or lazy
        return None
    forward = type(module).forward  # a subclass may compute something else, such as standardised weights
    if isinstance(module, Conv1D) and forward is Conv1D.forward:
        return RowGeometry("linear", 1, module.weight.shape[0])
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return RowGeometry("linear", 1, module.in_features)
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward:
        (high, wide), (down, right), dilation = module.kernel_size, module.stride, module.dilation
        width, padding = module.in_channels // module.groups * high * wide, _conv_padding(module)
        return RowGeometry(
            "conv2d", module.groups, width, (high, wide), (down, right), padding, module.padding_mode,
            (dilation[0], dilation[1]),
        )  # fmt: skip
    return None


@dataclass(frozen=True)
class LayerSelection:
    """Result of `find_layers`."""

    layers: tuple[ProtectedLayer, ...]  #: what can be protected, in the model's order
    frozen: dict[str, str]  #: reason by parameter name for every parameter that will not be trained

    def without(self, reasons: Mapping[str, str]) -> LayerSelection:
        """The same selection with the layers named in `reasons` moved to the frozen ones."""
        kept = tuple(layer for layer in self.layers if layer.name not in reasons)
        dropped = {layer.weight_name: reasons[layer.name] for layer in self.layers if layer.name in reasons}
        return LayerSelection(kept, {**self.frozen, **dropped})


def _matches(name: str, target_modules: str | Sequence[str] | None) -> bool:
    if target_modules is None or target_modules in ("all", "all-linear"):
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith("." + target) for target in target_modules)


def find_layers(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> LayerSelection:
    """Protectable layers of a model, and why each other parameter is frozen.

    Args:
        model: any module. In a PEFT LoRA model only the `lora_A` factors are protectable, and `lora_B` stays free.
        target_modules: None or "all" for every protectable layer; a list of module names or name endings; or a
            regular expression that must match the whole module name (PEFT's conventions).

    Raises:
        UNSCError: when `target_modules` matches nothing, or when no layer can be protected.
    """
    modules = dict(model.named_modules())
    lora_names = [name for name, module in modules.items() if isinstance(module, LoraLayer)]
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)

    candidates: dict[str, ProtectedLayer] = {}
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        if lora_names and ".lora_A." not in name:
            continue
        geometry = row_geometry(module)
        if geometry is None:
            continue
        shared = [other for other in owners[id(module.weight)] if other != f"{name}.weight"]
        if shared:
            reasons[f"{name}.weight"] = f"tied to {shared[0]}"
            continue
        candidates[name] = ProtectedLayer(plain_name(name), module, geometry, name, _source(modules, name))
    if not candidates:
        kinds = "nn.Linear, Conv1D or nn.Conv2d with an untied weight"
        raise UNSCError(f"model: {type(model).__name__} has no protectable layer ({kinds}).")

    layers = tuple(layer for layer in candidates.values() if _matches(layer.name, target_modules))
    if not layers:
        wanted = target_modules if isinstance(target_modules, str) else next(iter(target_modules or ("",)))
        endings = sorted({layer.name.rsplit(".", 1)[-1] for layer in candidates.values()})
        raise UNSCError(
            f"target_modules: {target_modules!r} matches no protectable layer of {type(model).__name__}; "
            f"did you mean {closest(wanted, endings)}? Its layers are {', '.join(endings)}."
        )

    protected = {layer.weight_name for layer in layers}
    for name, parameter in model.named_parameters():
        if name in protected or name in reasons or (lora_names and ".lora_B." in name):
            continue
        owner = name.rsplit(".", 1)[0] if "." in name else ""
        tied = len(owners[id(parameter)]) > 1
        reasons[name] = _reason(name, parameter, modules.get(owner, model), owner in candidates, tied)
    return LayerSelection(layers, reasons)


def _reason(name: str, parameter: nn.Parameter, owner: nn.Module, protectable: bool, tied: bool) -> str:
    """Why a parameter of `owner` is frozen."""
    kind = type(owner).__name__
    if protectable and name.endswith(".weight"):
        return "not selected by target_modules"
    if name.endswith(".bias"):
        return "bias"
    if tied:
        return "tied weight"
    convolution = isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if parameter.dim() > 2 and parameter.shape[0] > 1 and not convolution:
        return f"fused weight of {kind}, whose inputs cannot be observed apart"
    return f"parameter of {kind}"


def _source(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """The adapted layer that a LoRA factor belongs to, which passes its own input on.

    None for other layers, and for adapters of fused parameters, whose factors read something else.
    """
    owner = modules.get(name.split(".lora_A.")[0]) if ".lora_A." in name else None
    return owner if isinstance(owner, LoraLayer) and row_geometry(owner.get_base_layer()) is not None else None


def plain_name(name: str) -> str:
    """Name in the base model of the layer that a LoRA factor belongs to; other names are unchanged."""
    return name.removeprefix("base_model.model.").split(".lora_A.")[0]


def decoder_block(model: nn.Module, number: int) -> nn.Module:
    """Block `number` of a language model, counted from 0, or its last one.

    Raises:
        UNSCError: a model without a list of blocks.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise UNSCError(
            f"objective: {type(model).__name__} has no list of {count} blocks to read hidden states from; choose an "
            "objective that needs none."
        )
    return lists[0][min(max(number, 0), len(lists[0]) - 1)]
