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
from .accuracy import kept_classes, macro_accuracy, of_classes

Head = tuple[Tensor, Tensor | None]  # weight (labels, width) and bias (labels,)

PROBE_ROWS = 5000  # training rows of a probe of the head, about: as many of each class
_DRAWS = 20  # of the examples of a prototype attack


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: Iterable[int],
    *,
    per_class: int = 500,
) -> float | None:
    """Test accuracy on `classes` (macro) of a new linear head trained on the model's features of *all* classes.

    Features are (rows, width), labels true ids (rows,). It is trained on at most `per_class` rows of each class;
    UNSCError when these are of a single class.
    """
    chosen = at_most_per_class(train_labels, per_class)
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


def prototype_attack(outputs: RowOutputs, head: Head, forgotten: Sequence[int], shots: int) -> float | None:
    """Test accuracy on the forgotten classes (macro) after a few examples are written into the head, without training.

    The head's row of a forgotten class becomes the mean feature of `shots` of its training rows. It is scaled to the
    mean norm of the other rows and gets their mean bias. The result is the mean over 20 draws of the examples.
    """
    weight = head[0].detach().float().cpu()
    offsets = torch.zeros(len(weight)) if head[1] is None else head[1].detach().float().cpu()
    forget, test = outputs.forget, outputs.test
    asked = of_classes(test.labels, forgotten)
    features, labels = test.need_features()[asked], test.labels[asked]
    kept = kept_classes(len(weight), forgotten)
    generator = torch.Generator().manual_seed(0)
    results: list[float] = []
    for _ in range(_DRAWS):
        rows, shift = weight.clone(), offsets.clone()
        for c in sorted(forgotten):
            numbers = (forget.labels == c).nonzero()[:, 0]
            drawn = numbers[torch.randperm(len(numbers), generator=generator)[:shots]]
            mean = forget.need_features()[drawn].mean(0)
            rows[c] = mean * rows[kept].norm(dim=1).mean() / mean.norm().clamp_min(1e-12)
            shift[c] = offsets[kept].mean()
        accuracy = macro_accuracy(features @ rows.T + shift, labels, forgotten)
        if accuracy is None:
            return None
        results.append(accuracy)
    return float(np.mean(results))
