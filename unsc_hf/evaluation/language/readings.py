"""What a model says of the tokens of known answers: everything that token metrics need, from one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data.dialogues import AnswerCollator
from ...models.hooks import evaluation_mode
from ...models.outputs import read_answers
from ...utils.distributed import gathered, process

Result = TypeVar("Result")
TokenRows = Sequence[dict[str, list[int]]]  # `input_ids` and `labels`

_LOGITS_AT_ONCE = 2**24  # converted to float64 at a time


@dataclass(frozen=True)
class AnswerReading:
    """A model's probabilities of an answer's tokens, each after the true tokens before it. Arrays are (tokens,).

    Attributes:
        log_probs: natural logarithm of each token's probability, float64.
        recited: whether the token is the most likely one.
        mean, variance: of log p(x) for x drawn from the model's distribution there.
    """

    log_probs: np.ndarray
    recited: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @property
    def loss(self) -> float:
        """Mean loss of a token."""
        return -float(self.log_probs.mean())

    def without_last(self) -> AnswerReading:
        """Without the last token, which ends the text."""
        return AnswerReading(self.log_probs[:-1], self.recited[:-1], self.mean[:-1], self.variance[:-1])


def in_batches(
    lengths: Sequence[int],
    work: Callable[[list[int]], list[Result]],
    device: torch.device,
    batch_size: int,
    deal: bool = True,
    description: str | None = None,
) -> list[Result]:
    """Results of `work` on every row, made in batches of rows of like length.

    The batches do not depend on the number of processes, so the results do not either.

    Args:
        lengths: of the rows, in tokens.
        work: results of the rows of these numbers.
        device: of the model.
        batch_size: most rows of a batch.
        deal: whether the processes share the batches. All of them run equally often, as a sharded model needs.
        description: of a progress bar.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, world = process() if deal else (0, 1)
    mine: list[tuple[list[int], list[Result]]] = []
    turns = range(rank, -(-len(batches) // world) * world, world)
    for turn in tqdm(turns, desc=description, disable=description is None or process()[0] > 0, leave=False):
        made = work(batches[min(turn, len(batches) - 1)])
        if turn < len(batches):
            mine.append((batches[turn], made))
    results: dict[int, Result] = {}
    for part in gathered(mine, device) if deal else [mine]:
        for numbers, made in part:
            results.update(zip(numbers, made, strict=True))
    return [results[i] for i in range(len(lengths))]


def read_rows(
    model: nn.Module, rows: TokenRows, pad_token_id: int, batch_size: int, description: str | None = None
) -> list[AnswerReading]:
    """A reading of the labelled tokens of each row.

    Args:
        model: predicts next tokens.
        rows: token ids and labels; -100 hides a token.
        pad_token_id: fills batches up.
        batch_size: rows at a time, in one process.
        description: of a progress bar.
    """
    device = next(model.parameters()).device
    collate = AnswerCollator(pad_token_id)

    def work(numbers: list[int]) -> list[AnswerReading]:
        batch: dict[str, Any] = collate([rows[i] for i in numbers])
        labels = batch.pop("labels").to(device)
        with evaluation_mode(model):
            flat = read_answers(model(**{name: value.to(device) for name, value in batch.items()}).logits, labels)
            read = _read(flat.logits, flat.labels)
        counts = torch.bincount(flat.need_samples()).cumsum(0)[:-1].tolist()
        split = [np.split(part, counts) for part in read]
        return [AnswerReading(*parts) for parts in zip(*split, strict=True)]

    return in_batches([len(row["input_ids"]) for row in rows], work, device, batch_size, description=description)


def _read(logits: Tensor, labels: Tensor) -> list[np.ndarray]:
    """Log-probabilities, hits, and mean and variance of log p, in float64 and in blocks, for a vocabulary is wide."""
    pieces = max(1, -(-logits.numel() // _LOGITS_AT_ONCE))
    columns: list[list[Tensor]] = [[], [], [], []]
    for part, true in zip(logits.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
        log_p = part.double().log_softmax(-1)
        p, finite = log_p.exp(), log_p.clamp(min=-1e6)
        mean = (p * finite).sum(-1)
        values = (
            log_p.gather(1, true[:, None])[:, 0],
            part.argmax(-1) == true,
            mean,
            (p * finite.square()).sum(-1) - mean.square(),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return [torch.cat(column).cpu().numpy() for column in columns]


def gradient_norms(model: nn.Module, rows: TokenRows) -> list[float]:
    """Mean over parameters of the norm of the gradient of each row's loss, without its last token (arXiv 2402.17012).

    Rows that were trained on have small ones. Gradients are computed for one row at a time and not kept.

    Args:
        model: predicts next tokens; frozen parameters count too.
        rows: token ids and labels; -100 hides a token.
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    trained = [p.requires_grad for p in parameters]
    collate = AnswerCollator(0)

    def work(numbers: list[int]) -> list[float]:
        batch = {name: value.to(device) for name, value in collate([rows[i] for i in numbers]).items()}
        labels = batch.pop("labels")
        flat = read_answers(model(**batch).logits, labels)
        loss = torch.nn.functional.cross_entropy(flat.logits[:-1].float(), flat.labels[:-1])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [float(torch.stack([g.norm() for g in gradients if g is not None]).mean())]

    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with evaluation_mode(model, gradients=True):
            return in_batches([len(row["input_ids"]) for row in rows], work, device, 1)
    finally:
        for parameter, flag in zip(parameters, trained, strict=True):
            parameter.requires_grad_(flag)
