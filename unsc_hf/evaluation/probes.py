"""What features still say about forgotten classes: a linear probe, and a prototype attack without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..data.selection import at_most_per_class
from ..errors import UNSCError
from ..models.outputs import RowOutputs, join_outputs
from .accuracy import macro_accuracy, of_classes

PROBE_ROWS = 5000  # training rows of a probe of the head, about: as many of each class


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

    Features are (rows, width), labels true ids (rows,). It is trained on at most `per_class` rows of each class;
    UNSCError when these are of a single class.
    """
    chosen = at_most_per_class(train_labels, per_class, np.random.default_rng(seed))
    if len(np.unique(train_labels.numpy()[chosen])) < 2:
        raise UNSCError("train_labels: hold a single class; a probe needs at least two.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
    probe.fit(train_features.numpy()[chosen], train_labels.numpy()[chosen])
    return macro_accuracy(probe.predict(test_features.numpy()), test_labels, classes)


def probe_head(outputs: RowOutputs, forgotten: Sequence[int]) -> float | None:
    """`linear_probe` of the head's inputs: trained on a model's training rows, tested on its test rows."""
    train, test = join_outputs([outputs.forget, outputs.retain]), outputs.test
    per_class = -(-PROBE_ROWS // test.logits.shape[1])
    return linear_probe(
        train.need_features(), train.labels, test.need_features(), test.labels, forgotten, per_class=per_class
    )


def attack_head(
    outputs: RowOutputs, head: tuple[Tensor, Tensor | None], forgotten: Sequence[int], shots: int
) -> float | None:
    """`prototype_attack` with `shots` of the forgotten training rows of a model's outputs, tested on its test rows."""
    forget, test = outputs.forget, outputs.test
    asked = of_classes(test.labels, forgotten)
    drawn, tested = (forget.need_features(), forget.labels), (test.need_features()[asked], test.labels[asked])
    return prototype_attack(*head, *drawn, *tested, forgotten, shots=shots)


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
    """Test accuracy on `classes` (macro) after a few examples of each are written into the head, without any training.

    The head's row of a forgotten class becomes the mean feature of `shots` of its examples. It is scaled to the mean
    norm of the other rows and gets their mean bias. The result is the mean over `repeats` draws from the forget rows.

    Args:
        weight, bias: of the model's head, (labels, width) and (labels,).
        forget_features, test_features: (rows, width); the test rows are of the forgotten classes.
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
