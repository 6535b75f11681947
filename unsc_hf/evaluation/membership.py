"""Membership inference: can an attacker tell forgotten training rows from rows that the model never saw?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..errors import UNSCError
from ..models.outputs import RowOutputs
from .accuracy import of_classes

_LARGEST_LOSS = 50.0  # masked logits give an infinite loss

Rows = tuple[Tensor, Tensor]  # logits (rows, labels) and labels (rows,)


def attack_features(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Loss on the true label, confidence and entropy of each row, shape (rows, 3)."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    loss = -log_p.gather(1, labels[:, None])[:, 0].clamp(min=-_LARGEST_LOSS)
    entropy = -(p * log_p.clamp(min=-1e6)).sum(1)
    return torch.stack([loss.clamp(max=_LARGEST_LOSS), p.amax(1), entropy], dim=1).numpy()


def attack_forgotten_rows(outputs: RowOutputs, forgotten: Sequence[int]) -> dict[str, float]:
    """The attack on the forgotten training rows, from a model's outputs; empty where there are no test rows for it.

    The rows that the model never saw are the test rows of the `forgotten` classes. Where no class is forgotten whole,
    half of the test rows teach the attacker and the other half are accused.
    """
    forget, retain, test = outputs.forget, outputs.retain, outputs.test
    accused = of_classes(test.labels, forgotten) if forgotten else torch.arange(len(test.labels)) % 2 == 1
    if not bool(accused.any()):
        return {}
    return membership_inference(
        (retain.logits, retain.labels),
        (test.logits[~accused], test.labels[~accused]),
        (forget.logits, forget.labels),
        (test.logits[accused], test.labels[accused]),
    )


def exposure(losses: Tensor, unseen: Tensor) -> float:
    """Chance that a row has a smaller loss than an unseen one: the AUC of the loss attack (arXiv 1709.01604).

    It is 0.5 when the two look alike, and 1 when every row has a smaller loss than every unseen one; ties count half.
    `losses` are of the rows to forget, (rows,); `unseen` of rows the model never saw, *sorted*, (unseen rows,).
    """
    below, up_to = (torch.searchsorted(unseen, losses, right=right) for right in (False, True))
    return float(1 - (below + up_to).double().mean() / (2 * len(unseen)))


def tolerated_exposure(rows: int) -> float:
    """Exposure of so many rows by chance: 0.5 plus a standard deviation of the AUC, 1 / sqrt(12 rows), at least
    0.51."""
    return 0.5 + max(0.01, (12 * rows) ** -0.5)


def accuracy_gap(accuracy: float, unseen: float, rows: int) -> float:
    """How much more accurate the model is on the rows to forget than on unseen ones: the gap attack (arXiv 1709.01604).

    More than 0 where the model knows too many of these `rows`. What `unseen` lets expect is rounded up to a whole row.
    """
    return (round(rows * accuracy) - math.ceil(rows * unseen - 1e-3)) / rows


def membership_inference(
    retain_train: Rows, retain_test: Rows, forget_train: Rows, forget_test: Rows
) -> dict[str, float]:
    """Logistic regression on loss, confidence and entropy, fitted on retained rows and used on forgotten ones.

    The attacker knows which retained rows are members (training) and which are not (test), learns to tell them apart,
    and is asked to tell forgotten training rows from test rows of the forgotten classes. Both sides are balanced by
    sampling.

    Returns:
        `auc`, the area under the ROC curve: at 0.5 members and non-members look alike, as after retraining.
        `tpr_at_1pct_fpr`: share of forgotten rows that are found when 1 % of unseen ones are accused wrongly; 0.01 is
        chance.

    Raises:
        UNSCError: when one of the four has no rows.
    """
    names = ("retain_train", "retain_test", "forget_train", "forget_test")
    for name, (logits, _) in zip(names, (retain_train, retain_test, forget_train, forget_test), strict=True):
        if len(logits) == 0:
            raise UNSCError(f"{name}: has no rows; the attack needs members and non-members of both kinds.")
    rng = np.random.default_rng(0)

    def balanced(members: Rows, others: Rows) -> tuple[np.ndarray, np.ndarray]:
        x1, x0 = attack_features(*members), attack_features(*others)
        n = min(len(x1), len(x0))
        x = np.concatenate([x1[rng.permutation(len(x1))[:n]], x0[rng.permutation(len(x0))[:n]]])
        return x, np.repeat([1, 0], n)

    x, y = balanced(retain_train, retain_test)
    attacker = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
    x, y = balanced(forget_train, forget_test)
    scores = attacker.decision_function(x)
    fpr, tpr, _ = roc_curve(y, scores)
    return {"auc": float(roc_auc_score(y, scores)), "tpr_at_1pct_fpr": float(tpr[fpr <= 0.01].max())}
