"""How well a model that never saw them would know the rows to forget: what they should look like afterwards.

Rows differ in how hard they are. A retrained model gets the hard ones among the forgotten rows wrong. These are not the
rows that the original is least sure of, for it has learned them by heart. And training rows are often easier than those
of another split, so even a model that never saw them knows them better than "unseen" rows.

Both are estimated by simple classifiers that are taught retained rows alone: linear discriminants (Fisher 1936;
covariance shrunk after Ledoit and Wolf 2004) and nearest neighbours (Cover and Hart 1967; training rows often have a
near duplicate, which a linear rule does not see). They read two kinds of features:

- of several models of the same architecture with fresh weights. Such features still carry what a row looks like (random
  features: Rahimi and Recht, NIPS 2007), and saw nobody's rows. They choose the unseen rows to compare with.
- of the original. Its features were shaped by the rows to forget, so they do not say how easy all of them are, but they
  help to rank them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.stats import rankdata
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..erasure.readings import Reading, find_readings, read_all
from ..errors import UNSCError
from ..models.hooks import NOT_INPUTS, evaluation_mode

Rows = tuple[list[np.ndarray], np.ndarray]  # features by reading, (rows, width) each, and labels, (rows,)


TWINS = 3
_ROWS_AT_ONCE = 256  # whose distances to all taught rows are held in memory
_MOST_COUNTERPARTS = 100  # unseen rows beside each row to forget: of two rows, a hundred each say enough


@dataclass(frozen=True)
class LeftOut:
    """Rows to forget as a model would see them that never saw them."""

    order: Tensor  # the larger, the better a row would be known, (forget rows,)
    counterparts: list[
        int
    ]  # numbers of unseen rows that are as hard, equally many for each forget row, with repetition

    @classmethod
    def of(
        cls,
        model: nn.Module,
        taught: Any,
        forget: Any,
        unseen: Any,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        *,
        batch_size: int = 256,
        seed: int = 0,
        progress: bool = False,
    ) -> LeftOut:
        """Ask the original classifier and its twins, whose weights come from `seed`.

        Rows are prepared: retained ones (`taught`), rows to forget, and rows that the model never saw. `collate` makes
        a batch with "labels". UNSCError for retained rows of a single class.
        """

        def ease(of: nn.Module, name: str) -> np.ndarray:
            rows = [
                read_rows(of, part, collate, batch_size, f"{what}, {name}" if progress else None)
                for part, what in ((taught, "Retained rows"), (forget, "Rows to forget"), (unseen, "Unseen rows"))
            ]
            return left_out_ease(rows[0], rows[1:])

        twins = np.mean(
            [ease(untrained_twin(model, seed + i), f"untrained twin {i + 1} of {TWINS}") for i in range(TWINS)], axis=0
        )
        count = len(forget)
        order = torch.from_numpy(twins + ease(model, "original"))[:count]
        return cls(order, counterparts(twins[:count], twins[count:]))


def untrained_twin(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same configuration with fresh weights, on the same device; adapters are left out."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin: nn.Module = type(base)(copy.deepcopy(base.config))
    return twin.to(next(model.parameters()).device).requires_grad_(False)


def read_rows(
    model: nn.Module,
    rows: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int = 256,
    description: str | None = None,
) -> Rows:
    """Hidden states, averaged over tokens or positions, and the head's input, of all prepared rows.

    Models without hidden states give the head's input alone; where the head reads every token, it is left out.
    """
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())
    device = next(model.parameters()).device
    readings = None
    parts: list[list[np.ndarray]] = []
    labels: list[Tensor] = []
    for batch in tqdm(loader, desc=description, disable=description is None, leave=False):
        ready = {name: value.to(device) for name, value in batch.items() if name not in NOT_INPUTS}
        if readings is None:
            readings = _readings(model, ready)
            parts = [[] for _ in readings]
        with evaluation_mode(model):
            states = read_all(model, readings, ready)
        for part, x in zip(parts, states, strict=True):
            part.append(x.detach().double().cpu().numpy())
        labels.append(batch["labels"].cpu())
    return [np.concatenate(part) for part in parts], torch.cat(labels).numpy()


def _readings(model: nn.Module, batch: dict[str, Any]) -> list[Reading]:
    """All that can be read of a model."""
    try:
        readings = find_readings(model, True, False, batch)
    except UNSCError:  # no hidden states; without a head this raises again
        return find_readings(model, False, False, batch)
    try:
        with evaluation_mode(model):
            read_all(model, readings, batch)
    except UNSCError:  # a head that reads every token
        return readings[:-1]
    return readings


def left_out_ease(taught: Rows, asked: Sequence[Rows]) -> np.ndarray:
    """How easily all asked rows would be known, from 0 to 1, (n,): mean quantile of both classifiers' margins."""
    return mean_quantiles(np.concatenate([left_out_margins(taught, asked), neighbour_margins(taught, asked)]))


def left_out_margins(taught: Rows, asked: Sequence[Rows]) -> np.ndarray:
    """Score of the true class above the best other one, by discriminants: (readings, all asked rows).

    A row of a class that the taught rows lack would not be known at all: its margin is minus infinity. UNSCError for
    taught rows of a single class.
    """
    features, labels = taught
    if len(np.unique(labels)) < 2:
        raise UNSCError("retain_dataset: holds a single class; pseudo_labels 'left_out' needs at least two.")
    truth = np.concatenate([given for _, given in asked])
    margins = []
    for number, x in enumerate(features):
        discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, labels)
        scores = discriminant.decision_function(np.concatenate([given[number] for given, _ in asked]))
        if scores.ndim == 1:  # of two classes: the second one's score above the first one's
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        own = discriminant.classes_[None, :] == truth[:, None]
        true = np.where(own, scores, -np.inf).max(1)
        margins.append(true - np.where(own, -np.inf, scores).max(1))
    return np.stack(margins)


def neighbour_margins(taught: Rows, asked: Sequence[Rows]) -> np.ndarray:
    """How much farther the nearest taught row of another class is than one of its own: (readings, all asked rows).

    Euclidean, of features scaled to unit variance over the taught rows; minus infinity for classes that they lack.
    """
    features, labels = taught
    given, truth = torch.from_numpy(labels), torch.from_numpy(np.concatenate([of for _, of in asked]))
    margins = []
    for number, x in enumerate(features):
        scaler = StandardScaler().fit(x)
        near = torch.from_numpy(scaler.transform(x))
        rows = torch.from_numpy(scaler.transform(np.concatenate([part[number] for part, _ in asked])))
        gaps = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            apart, own = torch.cdist(rows[some], near), truth[some, None] == given[None, :]
            gaps.append(apart.masked_fill(own, torch.inf).amin(1) - apart.masked_fill(~own, torch.inf).amin(1))
        margins.append(torch.cat(gaps).numpy())
    return np.stack(margins)


def mean_quantiles(values: np.ndarray) -> np.ndarray:
    """Rank of each column within its row, from 0 to 1, averaged over the rows (readings, n). Ties share a rank."""
    mean: np.ndarray = np.mean((rankdata(values, axis=1) - 0.5) / values.shape[1], axis=0)
    return mean


def counterparts(forget: np.ndarray, unseen: np.ndarray) -> list[int]:
    """Numbers of the unseen rows nearest in ease to each row to forget: in all about as many as there are."""
    each = min(_MOST_COUNTERPARTS, max(1, len(unseen) // len(forget)), len(unseen))
    nearest = NearestNeighbors(n_neighbors=each).fit(unseen[:, None])
    numbers: list[int] = nearest.kneighbors(forget[:, None], return_distance=False).ravel().tolist()
    return numbers
