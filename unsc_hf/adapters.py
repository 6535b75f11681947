"""LoRA inside the null space: dW = s B A changes nothing on retained inputs x if A x = 0, whatever B is.

So A starts from the principal directions of the *forgotten* activations within the null space, stays there, and B is
free. The result is an ordinary PEFT adapter; the base weights are not touched.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UNSCError, closest
from .layers import LayerSelection, ProtectedLayer, find_layers, plain_name, row_geometry
from .moments import Moment, SecondMoment
from .outputs import find_head
from .precision import full_float32
from .projection import NullSpaceProjection
from .sharding import cut_like, is_sharded, local, own_rows, whole
from .sketch import MomentSketch
from .subspace import LayerSubspace, Subspace, descending_eigh

logger = logging.getLogger(__name__)

_ADAPTER = "default"
_LEAST_SHARE = 1e-7  # of the largest singular value: what is smaller is rounding


def check_lora_config(config: PeftConfig) -> LoraConfig:
    """The config, if an adapter made by it can keep the promise.

    Raises:
        UNSCError: naming the option that breaks it, and why.
    """
    if not isinstance(config, LoraConfig):
        raise UNSCError(f"peft_config: got {type(config).__name__}; only LoraConfig can be confined to a null space.")
    reasons = {
        "use_dora": (config.use_dora, "DoRA rescales the whole weight, so retained outputs change"),
        "lora_bias": (config.lora_bias, "a bias changes every output"),
        "bias": (config.bias != "none", "trained biases change every output; use bias='none'"),
        "modules_to_save": (bool(config.modules_to_save), "those modules would be trained without projection"),
        "trainable_token_indices": (bool(config.trainable_token_indices), "embeddings cannot be projected"),
        "layer_replication": (bool(config.layer_replication), "it changes the base model"),
        "init_lora_weights": (
            config.init_lora_weights not in (True, False, "gaussian"),
            "it changes the base weights; A is started in the null space anyway, so leave it out",
        ),
    }
    for option, (given, reason) in reasons.items():
        if given:
            raise UNSCError(f"peft_config: {option}={getattr(config, option)!r} breaks the promise: {reason}.")
    return config


def add_adapters(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Wrap `model` with LoRA adapters whose B is zero; `target_modules=None` means every linear layer but the head, or, where
    there is none (a ResNet), every convolution that is not grouped.

    Raises:
        UNSCError: an option that breaks the promise, or target modules that match nothing (the model's names are listed).
    """
    config = copy.deepcopy(check_lora_config(config))
    if config.target_modules is None:
        config.target_modules = "all-linear"
        if model.get_output_embeddings() is None:  # of language models PEFT leaves the head out itself
            head, _ = find_head(model, model.config.num_labels)
            config.exclude_modules = config.exclude_modules or [head]
            layers = [layer for layer in find_layers(model).layers if layer.name != head]
            if layers and all(isinstance(layer.module, nn.Conv2d) for layer in layers):
                config.target_modules = [layer.name for layer in layers if layer.geometry.groups == 1]
    if config.target_modules != "all-linear":
        names = [layer.name for layer in find_layers(model).layers]
        wanted = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
        try:
            find_layers(model, wanted)
        except UNSCError:
            endings = sorted({name.rsplit(".", 1)[-1] for name in names})
            first = wanted if isinstance(wanted, str) else wanted[0]
            raise UNSCError(
                f"peft_config: target_modules={wanted!r} matches no layer of {type(model).__name__}; "
                f"did you mean {closest(first, endings)}? Its layers are {', '.join(endings)}."
            ) from None
    config.init_lora_weights = True
    adapted = get_peft_model(model, config)
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and getattr(module.get_base_layer(), "groups", 1) > 1:
            raise UNSCError(
                f"peft_config: {plain_name(name)!r} is a grouped convolution; leave it out of target_modules."
            )
    return adapted


def null_space_start(
    subspace: LayerSubspace, forgotten: Moment, rank: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows for A, shape (rank, width), float64: the principal directions of the forgotten rows inside the null space.

    They are found on `device`. They are orthogonal, with norm sqrt(width / rank), so that a step of B moves the product as far as the same step of
    full fine-tuning would move W: one learning rate serves both. Rows beyond the capacity are zero, and stay zero.
    """
    start = torch.zeros(rank, subspace.width, dtype=torch.float64, device=device)
    basis, forgotten = subspace.basis[0].to(device), forgotten.to(device)
    if isinstance(forgotten, SecondMoment) and not subspace.thin:
        free = basis[:, subspace.ranks[0] :]
        _, vectors = descending_eigh(free.mT @ forgotten.matrix @ free)
        used = min(rank, free.shape[1])
        found = free @ vectors[0, :, :used]
    else:
        found = _sketched_start(basis[:, : subspace.ranks[0]], forgotten, rank)
    start[: found.shape[1]] = found.mT * math.sqrt(subspace.width / rank)
    return start


def _sketched_start(kept: Tensor, forgotten: Moment, rank: int) -> Tensor:
    """Principal directions, shape (width, at most rank), of forgotten rows outside the span of `kept`, where one of the two is
    known from a sketch: those of (I - S S^T) E with F^ = E E^T."""
    if isinstance(forgotten, MomentSketch):
        factor, _ = forgotten.factor()
    elif isinstance(forgotten, SecondMoment):
        values, vectors = descending_eigh(forgotten.matrix)
        factor = vectors[0] * values[0].sqrt()
    else:
        raise UNSCError("statistics: a sample of rows gives adapters no start; collect the forgotten rows' moments.")
    outside = factor - kept @ (kept.mT @ factor)
    vectors, values, _ = torch.linalg.svd(outside, full_matrices=False)
    above = int((values > _LEAST_SHARE * torch.linalg.matrix_norm(factor, 2)).sum())
    found = vectors[:, : min(rank, above, kept.shape[0] - kept.shape[1])]
    found, _ = torch.linalg.qr(
        found - kept @ (kept.mT @ found)
    )  # small values' directions are orthogonal to S up to rounding only
    return found


class LoraProjection(NullSpaceProjection):
    """The projection for adapters: A is started inside the null space and kept there, B is free.

    Leak and change are those of the product s B A against the base weight.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ProtectedLayer],
        subspace: Subspace,
        forgotten: Mapping[str, Moment],
        identity: bool = False,
    ) -> None:
        """
        Args:
            model: the PEFT model; its B factors are zero.
            layers: its `lora_A` factors.
            subspace: retained subspaces, by the names of the base layers.
            forgotten: second moments of the forgotten rows by key of `subspace`.
            identity: no projection, for controls: A keeps PEFT's own start.
        """
        self._lora = {
            plain_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        starts: dict[tuple[str, int], Tensor] = {}  # layers that read one input begin alike
        with torch.no_grad():
            for layer in layers:
                here, key = subspace[layer.name], subspace.module_keys[layer.name]
                if identity or not here.has_capacity:
                    continue
                rank = layer.weight.shape[0]
                if rank > here.capacity:
                    logger.warning("%s: rank %d is reduced to its capacity, %d.", layer.name, rank, int(here.capacity))
                if (key, rank) not in starts:
                    starts[key, rank] = null_space_start(here, forgotten[key], rank, layer.weight.device)
                start = layer.from_matrix(starts[key, rank][None])
                local(layer.weight).copy_(cut_like(start, layer.weight))
        super().__init__(layers, subspace, identity)

    def free_weights(self) -> dict[str, nn.Parameter]:
        """The B factors that are trained, by layer name."""
        return {layer.name: self._lora[layer.name].lora_B[_ADAPTER].weight for layer in self.layers}

    @full_float32()
    def change(self, layer: ProtectedLayer) -> Tensor:
        lora = self._lora[layer.name]
        return self._share(layer, self._base(layer).as_matrix(whole(lora.get_delta_weight(_ADAPTER).detach())))

    def measured(self, layer: ProtectedLayer) -> Tensor:
        """s R A with B = Q R: as many rows as the rank, not as many as there are outputs. Of sharded factors the product."""
        if is_sharded(layer.weight):
            return self.change(layer)
        lora, rows = self._lora[layer.name], layer.as_matrix(layer.weight.detach()).double()
        _, triangle = torch.linalg.qr(lora.lora_B[_ADAPTER].weight.detach().double().reshape(-1, rows.shape[1]))
        return lora.scaling[_ADAPTER] * (triangle @ rows)

    def original(self, layer: ProtectedLayer) -> Tensor:
        base = self._base(layer)
        return self._share(layer, base.as_matrix(whole(base.weight.detach())))

    @staticmethod
    def _share(layer: ProtectedLayer, matrix: Tensor) -> Tensor:
        """Where the factors are sharded, a product has to be put together; each process then counts its own rows of it."""
        return own_rows(matrix) if is_sharded(layer.weight) else matrix

    def _base(self, layer: ProtectedLayer) -> ProtectedLayer:
        module = self._lora[layer.name].get_base_layer()
        geometry = row_geometry(module)
        if geometry is None:
            raise UNSCError(
                f"peft_config: {layer.name!r} is a {type(module).__name__}, whose change cannot be measured."
            )
        return ProtectedLayer(layer.name, module, geometry)

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        free = {f"{name} (B)": local(weight.detach()).clone() for name, weight in self.free_weights().items()}
        return {**super().snapshot(), **free}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor] | None = None) -> None:
        super().restore(weights)
        for name, weight in self.free_weights().items():
            mine = local(weight)
            mine.copy_(torch.zeros_like(mine) if weights is None else weights[f"{name} (B)"])


def head_weights(model: nn.Module, num_labels: int) -> tuple[Tensor, Tensor | None]:
    """Weight (labels, width) and bias of the head as they act, an adapter on it included."""
    name, head = find_head(model, num_labels)
    weight = whole(head.weight.detach())
    owner = dict(model.named_modules()).get(name.removesuffix(".base_layer"))
    if isinstance(owner, LoraLayer):
        weight = weight + whole(owner.get_delta_weight(_ADAPTER).detach())
    return weight, None if head.bias is None else whole(head.bias.detach())


def free_names(selection: LayerSelection) -> set[str]:
    """Parameter names of the B factors that belong to the selected layers."""
    return {layer.weight_name.replace(".lora_A.", ".lora_B.") for layer in selection.layers}
