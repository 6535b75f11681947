"""Greedy answers of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.hooks import evaluation_mode
from ...utils.distributed import is_sharded
from .readings import in_batches


def generate(
    model: nn.Module, prompts: Sequence[list[int]], pad_token_id: int, end_token_id: int | None, max_new_tokens: int,
    batch_size: int, description: str | None = None,
) -> list[list[int]]:  # fmt: skip
    """Greedy continuations of prompts, up to a token that ends the text, which is left out.

    Args:
        model: a causal language model with a generation config.
        prompts: token ids, at least one each. They are padded on the left.
        pad_token_id: fills batches up.
        end_token_id: ends the text, as the tokens of the generation config do.
        max_new_tokens: longest continuation.
        batch_size: prompts at a time, in one process.
        description: of a progress bar.
    """
    device = next(model.parameters()).device
    config: Any = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), end_token_id} - {None}
    options: dict[str, Any] = {"do_sample": False, "top_p": None, "top_k": None, "temperature": None}

    def work(numbers: list[int]) -> list[list[int]]:
        longest = max(len(prompts[i]) for i in numbers)
        ids, mask = [], []
        for i in numbers:
            padding = longest - len(prompts[i])
            ids.append([pad_token_id] * padding + prompts[i])
            mask.append([0] * padding + [1] * len(prompts[i]))
        with evaluation_mode(model):
            out: Tensor = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
                eos_token_id=sorted(ends) or None, pad_token_id=pad_token_id, use_cache=True,
                max_new_tokens=max_new_tokens, **options,
            )  # fmt: skip
        return [_before(row, ends) for row in out[:, longest:].tolist()]

    # A sharded model must run on all processes in step, but answers end at different lengths.
    deal = not is_sharded(next(model.parameters()))
    return in_batches([len(prompt) for prompt in prompts], work, device, batch_size, deal, description)


def _before(ids: list[int], ends: set[Any]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
