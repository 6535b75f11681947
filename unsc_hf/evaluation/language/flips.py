"""Flips of a language model: how many kept answer tokens are no longer the ones it would choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...data.dialogues import AnswerCollator
from ...errors import UNSCError
from ...models.hooks import evaluation_mode
from ...models.outputs import read_answers
from ..flips import upper_bound
from .readings import TokenRows, in_batches


@dataclass(frozen=True)
class TokenFlips:
    """Changed choices on the tokens of kept answers.

    Attributes:
        tokens: number of tokens.
        changed: tokens at which another token is the most likely one.
        drift: mean Kullback-Leibler divergence of the next-token distributions, KL(before || after), in nats.
    """

    tokens: int
    changed: int
    drift: float

    @property
    def share(self) -> float:
        """Changed tokens as a share of all."""
        return self.changed / self.tokens

    @property
    def upper_95(self) -> float:
        """With 95 % confidence, at most this share changes (Clopper and Pearson), if tokens were independent draws."""
        return upper_bound(self.changed, self.tokens)


def count_token_flips(before: Tensor, after: Tensor) -> TokenFlips:
    """Compare two models' logits at the same tokens.

    Args:
        before, after: logits, (tokens, vocabulary).

    Raises:
        UNSCError: logits of different shapes, or no tokens.
    """
    if before.shape != after.shape or len(before) == 0:
        raise UNSCError(
            f"logits: shapes {tuple(before.shape)} and {tuple(after.shape)}; use the same tokens, at least one."
        )
    old, new = before.double().log_softmax(-1), after.double().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(new, old, reduction="batchmean", log_target=True)
    return TokenFlips(len(before), int((before.argmax(-1) != after.argmax(-1)).sum()), float(divergence))


def join_token_flips(parts: Sequence[TokenFlips]) -> TokenFlips:
    """The flips of several sets of tokens together."""
    tokens = sum(part.tokens for part in parts)
    drift = sum(part.drift * part.tokens for part in parts) / tokens
    return TokenFlips(tokens, sum(part.changed for part in parts), drift)


def token_flips(
    original: nn.Module, model: nn.Module, rows: TokenRows, pad_token_id: int, batch_size: int,
    description: str | None = None,
) -> TokenFlips:  # fmt: skip
    """Compare two models on the labelled tokens of rows, each after the true tokens before it.

    Args:
        original, model: both predict next tokens, and may be on different devices.
        rows: token ids and labels; -100 hides a token.
        pad_token_id: fills batches up.
        batch_size: rows at a time, in one process.
        description: of a progress bar.
    """
    collate = AnswerCollator(pad_token_id)
    device = next(model.parameters()).device

    def work(numbers: list[int]) -> list[TokenFlips]:
        batch = collate([rows[i] for i in numbers])
        labels, flat = batch.pop("labels"), []
        for one in (original, model):
            place = next(one.parameters()).device
            with evaluation_mode(one):
                logits = one(**{name: value.to(place) for name, value in batch.items()}).logits
            flat.append(read_answers(logits.detach(), labels.to(place)))
        samples = flat[1].need_samples()
        before = flat[0].logits.to(device)
        return [
            count_token_flips(before[samples == sample], flat[1].logits[samples == sample])
            for sample in range(len(numbers))
        ]

    lengths = [len(row["input_ids"]) for row in rows]
    return join_token_flips(in_batches(lengths, work, device, batch_size, description=description))
