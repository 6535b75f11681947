"""Boundary shrinking and expanding (Chen et al., "Boundary Unlearning", CVPR 2023, arXiv 2303.11570, 3.3 and 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...models.hooks import evaluation_mode, model_inputs
from ...models.outputs import Outputs, find_head
from ..workbench import Workbench
from .registry import LEARNING_RATES, PUBLISHED, method

BOUND = 0.1  # of the inputs' range, as in the paper


@method("boundary shrink", LEARNING_RATES)
def boundary_shrink(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Each forget row gets the class that lies nearest across the boundary: the label of its FGSM example."""

    def nearest(model: nn.Module, batches: Iterator[dict[str, Any]], _outputs: Outputs) -> Tensor:
        with evaluation_mode(model, gradients=True):
            logits = torch.cat([attacked_logits(model, batch) for batch in batches])
        logits[:, bench.forgotten] = -torch.inf
        return logits.argmax(1)

    return bench.unlearn(relabel=nearest, **PUBLISHED, **settings)


def attacked_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Logits after one step of the fast gradient sign method on what the input embedding gives, for any modality.

    The batch runs in one piece, since the step is one of all its embeddings.
    """
    inputs, seen = model_inputs(batch), list[Tensor]()

    def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    def move(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output + BOUND * (seen[0].max() - seen[0].min()).detach() * gradient.sign()

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    with embedding.register_forward_hook(watch):
        loss = nn.functional.cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, seen[0])
    with embedding.register_forward_hook(move), torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits.float().cpu()


@method("boundary expand", LEARNING_RATES)
def boundary_expand(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Teach the forget rows as a class that does not exist, in a head with one more output, and take that output away.

    It stops when the forget rows have gone to the new class. Without that class some of them may come back, which
    validation rows show.
    """
    classes = int(bench.original.config.num_labels)
    model = bench.fresh()
    _resize_head(model, classes, classes + 1)
    model = bench.unlearn(
        model=model,
        relabel=lambda _model, _batches, outputs: torch.full_like(outputs.labels, classes),
        **PUBLISHED,
        **settings,
    )
    _resize_head(model, classes + 1, classes)
    return model


def _resize_head(model: PreTrainedModel, old: int, new: int) -> None:
    """Give the head `new` outputs: the first ones are the old ones, a new one starts at zero.

    The config keeps its labels.
    """
    name, head = find_head(model, old)
    resized = nn.Linear(head.in_features, new, head.bias is not None).to(head.weight)
    with torch.no_grad():
        for part in ("weight", "bias"):
            if getattr(head, part) is not None:
                target = getattr(resized, part).zero_()
                target[: min(old, new)] = getattr(head, part)[: min(old, new)]
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, resized)
