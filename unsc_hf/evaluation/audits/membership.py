"""Membership inference on the forgotten training rows, by three attackers.

The attacker has the model's outputs, and must tell forgotten training rows from test rows of the forgotten classes.
An AUC of 0.5 is chance, and what retraining gives. A value far below 0.5 is over-erasure: it gives the rows away too.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from ...models.outputs import RowOutputs
from ..membership import attack_features, attack_forgotten_rows
from .registry import Examination, Reading, audit

POINTS = 41  # of the ROC curve


@audit("membership attack", headline="auc")
def membership(exam: Examination) -> Reading:
    """`auc`, `tpr_at_1pct_fpr`: logistic regression on loss, confidence and entropy. `loss_auc`, `loss_roc`: the loss
    alone (Yeom et al., arXiv 1709.01604). `rmia_auc`, with two references or more: likelihood relative to models that
    never saw the row (Zarifzadeh et al., "Low-Cost High-Power Membership Inference", ICML 2024, arXiv 2312.03262,
    equation 4). The population of other rows in that equation rescales the score but does not reorder it, so the AUC
    needs none.
    """
    unseen = exam.of_forgotten(exam.outputs.test.labels)
    logits, labels = _accused(exam.outputs, unseen)
    member = np.repeat([1, 0], [len(exam.outputs.forget.labels), int(unseen.sum())])
    loss = attack_features(logits, labels)[:, 0]
    rates, hits, _ = roc_curve(member, -loss)
    reading: Reading = {
        "loss_auc": float(roc_auc_score(member, -loss)),
        "loss_roc": np.interp(np.linspace(0, 1, POINTS), rates, hits).tolist(),
    }
    reading |= attack_forgotten_rows(exam.outputs, exam.forgotten)
    if len(exam.references) >= 2:
        elsewhere = torch.stack([_likelihood(one, unseen) for one in exam.references]).mean(0)
        ratio = _likelihood(exam.outputs, unseen) / elsewhere.clamp_min(1e-12)
        reading["rmia_auc"] = float(roc_auc_score(member, ratio.numpy()))
    return reading


def _accused(outputs: RowOutputs, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of the forgotten training rows, then of the unseen test rows."""
    forget, test = outputs.forget, outputs.test
    return torch.cat([forget.logits, test.logits[unseen]]), torch.cat([forget.labels, test.labels[unseen]])


def _likelihood(outputs: RowOutputs, unseen: Tensor) -> Tensor:
    """Probability of the true label of each accused row, (rows,)."""
    logits, labels = _accused(outputs, unseen)
    return logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
