"""Tiny models for offline tests on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from unsc_hf.models.layers import ProtectedLayer, row_geometry


def make_vit(
    labels: int = 3, hidden: int = 48, layers: int = 2, image: int = 8, patch: int = 4, **config: Any
) -> ViTForImageClassification:
    """A ViT of a few thousand weights, without dropout unless asked for; biases and norms are random, not trivial."""
    settings = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 2 * hidden,
        "image_size": image, "patch_size": patch, "num_labels": labels, "num_channels": 3,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config,
    }  # fmt: skip
    return randomise(ViTForImageClassification(ViTConfig(**settings)))


def layer_of(module: torch.nn.Module, name: str = "layer") -> ProtectedLayer:
    geometry = row_geometry(module)
    assert geometry is not None
    return ProtectedLayer(name, module, geometry)


def learned(data: Dataset) -> PreTrainedModel:
    """A tiny ViT that has learned the classes of `data`."""
    batch = data[:]
    return fit(make_vit(), {"pixel_values": batch["pixel_values"], "labels": batch["label"]}, steps=60)


def fit(model: PreTrainedModel, batch: dict[str, Any], steps: int) -> PreTrainedModel:
    """Train on one batch, again and again; the batch contains labels."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a little noise on all weights, so that biases and norms are not zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def copied(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Copies of named parameters or buffers."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def logits(model: Any, rows: Dataset) -> torch.Tensor:
    """Logits of prepared rows of images or texts."""
    with torch.no_grad():
        return model.eval()(**_inputs(rows, model.dtype)).logits


def exact_logits(model: Any, rows: Dataset) -> torch.Tensor:
    """Logits of the float32 weights, computed in float64 to exclude the rounding of the forward passes."""
    return logits(copy.deepcopy(model).double(), rows)


def _inputs(rows: Dataset, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch = {name: value for name, value in rows[:].items() if name != "label"}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference relative to that of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm())
