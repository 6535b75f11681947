"""One tiny model of every architecture that is tested, and rows for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from helpers.models import exact_logits, logits, randomise
from helpers.rows import tensor_dataset

LABELS = 10
NAMES = list("abcdefghij")
VOCABULARY = 40
PAD = 1
COMMON = {"num_labels": LABELS}
TEXT = {**COMMON, "vocab_size": VOCABULARY, "pad_token_id": PAD}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
DECODER = {**TEXT, **ENCODER, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 32}
IMAGE = {**COMMON, "image_size": 8, "patch_size": 4, "num_channels": 3}
POSITIONS = {"max_position_embeddings": 32}
STAGES = {**COMMON, "depths": [1, 1]}


# By the names of transformers' `model_type`.
MODELS: dict[str, dict[str, Any]] = {
    "vit": {**IMAGE, **ENCODER, **NO_DROPOUT},
    "deit": {**IMAGE, **ENCODER, **NO_DROPOUT, "architectures": ["DeiTForImageClassification"]},
    "swin": {**IMAGE, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "dinov2": {**IMAGE, **ENCODER, "mlp_ratio": 2},
    "convnext": {**STAGES, "hidden_sizes": [32, 48], "image_size": 16, "num_stages": 2, "patch_size": 2},
    "resnet": {**STAGES, "hidden_sizes": [64, 96], "embedding_size": 64, "layer_type": "basic"},
    "clip": {**COMMON, "vision_config": {**IMAGE, **ENCODER}, "text_config": {**ENCODER, "vocab_size": VOCABULARY}},
    "bert": {**TEXT, **ENCODER, **POSITIONS, **NO_DROPOUT},
    "roberta": {**TEXT, **ENCODER, **POSITIONS, **NO_DROPOUT},
    "distilbert": {**TEXT, **POSITIONS, "dim": 48, "n_layers": 2, "n_heads": 2, "hidden_dim": 96},
    "deberta-v2": {
        **TEXT, **ENCODER, **POSITIONS, **NO_DROPOUT, "pad_token_id": 0, "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm",
    },
    "gpt2": {**TEXT, "n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": DECODER,
    "qwen3": DECODER,
    "gemma": DECODER,
    "gemma2": {**DECODER, "sliding_window": 4},
    "mixtral": {**DECODER, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 2},
    "bart": {
        **TEXT, **POSITIONS, "eos_token_id": 2, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "dropout": 0.0,
    },
    "t5": {
        **TEXT, "d_model": 48, "d_kv": 24, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.0,
    },
}  # fmt: skip
LARGE_IMAGES = {"convnext": 16, "resnet": 16}


def build(name: str) -> PreTrainedModel:
    """The tiny model with random biases and norms, and running statistics that are not zeros and ones."""
    auto = AutoModelForSequenceClassification if "vocab_size" in MODELS[name] else AutoModelForImageClassification
    model = randomise(auto.from_config(AutoConfig.for_model(name, **MODELS[name])))
    if name == "resnet":
        model.train()
        with torch.no_grad():
            for _ in range(5):
                model(torch.randn(16, 3, 16, 16))
    return model.eval()


def text_dataset(samples: list[list[int]], labels: list[int]) -> Dataset:
    """Token ids of unequal lengths, padded on the right with a mask, as a tokenizer would."""
    longest = max(map(len, samples))
    tokens = {
        "input_ids": [sample + [PAD] * (longest - len(sample)) for sample in samples],
        "attention_mask": [[1] * len(sample) + [0] * (longest - len(sample)) for sample in samples],
    }
    rows = Dataset.from_dict({**tokens, "label": labels})
    return rows.cast_column("label", ClassLabel(names=NAMES)).with_format("torch")


def rows_for(model: PreTrainedModel, name: str) -> tuple[Dataset, Dataset]:
    """Forget rows of class 2; retained rows that repeat a few samples of classes 0 and 1: few distinct activations."""
    if model.main_input_name == "pixel_values":
        side = LARGE_IMAGES.get(name, 8)
        images = torch.randn(2, 3, side, side)
        retain = tensor_dataset(images.repeat(8, 1, 1, 1), [0, 1] * 8, NAMES)
        return tensor_dataset(torch.randn(24, 3, side, side), [2] * 24, NAMES), retain

    def sample() -> list[int]:
        length = int(torch.randint(3, 6, ()))
        return [*torch.randint(3, VOCABULARY, (length,)).tolist(), 2]  # 2 ends a text, where an architecture needs that

    kept = [sample(), sample()]
    return text_dataset([sample() for _ in range(24)], [2] * 24), text_dataset(kept * 8, [0, 1] * 8)


def reader(name: str) -> Callable[[Any, Dataset], torch.Tensor]:
    """How retained logits are compared: in float64, except where fused experts know no float64.

    Float32 passes alone are up to 7e-7 off (a randomly initialised ResNet), too near the limit of 1e-6.
    """
    return logits if name == "mixtral" else exact_logits
