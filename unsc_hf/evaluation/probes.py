"""What the features still say about forgotten classes: a linear probe, and a prototype attack without training."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..data.selection import at_most_per_class
from ..errors import UNSCError
from .accuracy import macro_accuracy


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: Iterable[int],
    *,
    per_class: int = 500,
    seed: int = 0,
) -> float | None:
    """Test accuracy on `classes` (macro) of a new linear head trained on the model's features of *all* classes.

    Args:
        train_features, test_features: inputs of the head, (rows, width).
        train_labels, test_labels: true ids, (rows,).
        classes: the forgotten classes.
        per_class: training rows per class for the probe.

    Raises:
        UNSCError: when fewer than two classes are there to be told apart.
    """
    chosen = at_most_per_class(train_labels, per_class, np.random.default_rng(seed))
    if len(np.unique(train_labels.numpy()[chosen])) < 2:
        raise UNSCError("train_labels: hold a single class; a probe needs at least two.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
    probe.fit(train_features.numpy()[chosen], train_labels.numpy()[chosen])
    return macro_accuracy(probe.predict(test_features.numpy()), test_labels, classes)


def prototype_attack(
    weight: Tensor,
    bias: Tensor | None,
    forget_features: Tensor,
    forget_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: Iterable[int],
    *,
    shots: int = 10,
    repeats: int = 20,
    seed: int = 0,
) -> float | None:
    """Test accuracy on `classes` (macro) after k examples of each are written into the head, without any training.

    The head's row of a forgotten class becomes the mean feature of `shots` of its examples, scaled to the mean norm of
    the other rows, with their mean bias. The mean over `repeats` draws of the examples is returned.

    Args:
        weight, bias: of the model's head, (labels, width) and (labels,).
        forget_features, forget_labels: rows the attacker may draw from.
        test_features, test_labels: test rows of the forgotten classes.
        classes: the forgotten classes.
    """
    forgotten = sorted(set(classes))
    kept = [c for c in range(weight.shape[0]) if c not in forgotten]
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.zeros(weight.shape[0]) if bias is None else bias.detach().float().cpu()
    results: list[float] = []
    for _ in range(repeats):
        head, shift = weight.detach().float().cpu().clone(), offsets.clone()
        for c in forgotten:
            rows = (forget_labels == c).nonzero()[:, 0]
            drawn = rows[torch.randperm(len(rows), generator=generator)[:shots]]
            mean = forget_features[drawn].mean(0)
            head[c] = mean * head[kept].norm(dim=1).mean() / mean.norm().clamp_min(1e-12)
            shift[c] = offsets[kept].mean()
        accuracy = macro_accuracy(test_features @ head.T + shift, test_labels, forgotten)
        if accuracy is None:
            return None
        results.append(accuracy)
    return float(np.mean(results))
