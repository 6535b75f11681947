"""Tiny models for offline tests on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification


def make_vit(
    labels: int = 3, hidden: int = 48, layers: int = 2, image: int = 8, patch: int = 4, **config: Any
) -> ViTForImageClassification:
    """A ViT of a few thousand weights, without dropout unless asked for; biases and norms are random, not trivial."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_channels": 3, **config}
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            image_size=image,
            patch_size=patch,
            num_labels=labels,
            **settings,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def learned(data: Dataset) -> PreTrainedModel:
    """A tiny ViT that knows the classes."""
    model = make_vit()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(60):
        out = model(pixel_values=data[:]["pixel_values"], labels=data[:]["label"])
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    return model.eval()
