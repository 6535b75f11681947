"""Loading models, image processors and tokenizers, and checks of a model's precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UNSCError, first_line

# Trained weights are far smaller; a flipped bit of an exponent gives more.
LARGEST_WEIGHT = 1e6


def load_config(name: str, argument: str) -> Any:
    """Config of a model, from a Hub id or folder.

    Raises:
        UNSCError: there is none; the message names `argument`.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UNSCError(f"{argument}: cannot load {name!r}: {first_line(error)}") from error


def load_model(name: str) -> PreTrainedModel:
    """Model of the architecture its config names, in float32, from a Hub id or folder; UNSCError where that fails."""
    config = load_config(name, "model")
    architecture = (config.architectures or [None])[0]
    cls = getattr(transformers, str(architecture), None)
    if cls is None:
        raise UNSCError(
            f"model: the config of {name!r} names architecture {architecture!r}, which transformers does not have."
        )
    return load_as(cls, name, "model")


def load_as(
    auto_class: Any, name: str, argument: str, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """A model of the kind that `auto_class` loads, in `dtype`, from a Hub id or folder.

    UNSCError, which names `argument`, where it cannot be loaded or a weight is missing.
    """
    try:
        model: PreTrainedModel
        model, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UNSCError(f"{argument}: cannot load {name!r}: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing and not options.get("ignore_mismatched_sizes"):  # a fine-tuned head is made anew
        raise UNSCError(
            f"{argument}: {name!r} lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]}; "
            "they would be random."
        )
    return model


def _load_processor(auto_class: Any, kind: str, name: str) -> Any:
    try:
        return auto_class.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UNSCError(f"model_name_or_path: {name!r} has no {kind}: {first_line(error)}") from error


# What was saved with a model, by its name; a UNSCError where there is none.
load_image_processor: Callable[[str], Any] = partial(_load_processor, AutoImageProcessor, "image processor")
load_tokenizer: Callable[[str], Any] = partial(_load_processor, AutoTokenizer, "tokenizer")


def own_processor(name: str, like: Any) -> Any:
    """The tokenizer or image processor saved with a model, of the same kind as `like`, or `like` where there is none.

    Each model needs its own: two tokenizers learned from the same texts may number their tokens differently. Where
    `like` is None the rows need no processor.
    """
    if like is None:
        return None
    kind, file = AutoImageProcessor, "preprocessor_config.json"
    if isinstance(like, PreTrainedTokenizerBase):
        kind, file = AutoTokenizer, "tokenizer_config.json"
    if Path(name).is_dir() and not Path(name, file).is_file():
        return like
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError):
        return like


def load_to_finetune(auto_class: Any, name: str, labels: Sequence[str]) -> PreTrainedModel:
    """A model to train further. A classifier's head is made anew where it does not fit `labels`."""
    if not labels:
        return load_as(auto_class, name, "model_name_or_path")
    ids = {label: i for i, label in enumerate(labels)}
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": ids}
    return load_as(auto_class, name, "model_name_or_path", ignore_mismatched_sizes=True, **names)


def model_label_names(model: PreTrainedModel) -> list[str]:
    """Names of the model's labels by id, whatever order its config lists them in."""
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]


def check_weights(model: nn.Module, frozen: bool = False) -> None:
    """Refuse anything but a transformers model, and weights in half precision, with a UNSCError that names the first.

    Where only adapters are trained the weights are `frozen`, and may be in bfloat16: adapters are in float32
    themselves. Weights that are not finite or absurdly large are refused too.
    """
    if not isinstance(model, PreTrainedModel):
        raise UNSCError(
            f"model: got {type(model).__name__}, expected a transformers PreTrainedModel, a Hub id or a folder."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16 or (parameter.dtype == torch.bfloat16 and not frozen):
            way = "load it with dtype=torch.float32 (bf16=True still trains in autocast)"
            if parameter.dtype == torch.bfloat16:
                way += ", or unlearn in adapters (peft_config), under which a bfloat16 model stays as it is"
            raise UNSCError(
                f"model: {name} is {str(parameter.dtype).removeprefix('torch.')}, which rounds small updates away and "
                f"breaks the promise; {way}."
            )
        largest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0  # NaN where there is one
        if not largest <= LARGEST_WEIGHT:
            raise UNSCError(
                f"model: {name} holds the value {largest:.3g}, which no training gives; its weights are damaged: fetch "
                "them again from where they come from."
            )
