"""Membership inference on the forgotten training rows, by three attackers.

Who attacks: somebody with the model's outputs, who must tell forgotten training rows from test rows of the forgotten classes.
0.5 is chance, and what retraining gives; both sides of it tell something, for a score far below is over-erasure.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from ...models.outputs import Outputs
from ..membership import attack_features, membership_inference
from .registry import Examination, Reading, audit

POINTS = 41  # of the ROC curve


@audit("membership attack", headline="auc")
def membership(exam: Examination) -> Reading:
    """`auc`, `tpr_at_1pct_fpr`: logistic regression on loss, confidence and entropy. `loss_auc`: the loss alone (Yeom et al., arXiv
    1709.01604). `rmia_auc`, with two references or more: likelihood relative to models that never saw the row (Zarifzadeh et
    al., "Low-Cost High-Power Membership Inference", ICML 2024, arXiv 2312.03262, equation 4); its population of other rows
    rescales the score but does not reorder it, so the AUC needs none.
    """
    forget, retain, test = exam.outputs.forget, exam.outputs.retain, exam.outputs.test
    unseen = exam.of_forgotten(test.labels)
    kept = (test.logits[~unseen], test.labels[~unseen])
    others = (test.logits[unseen], test.labels[unseen])
    found = membership_inference((retain.logits, retain.labels), kept, (forget.logits, forget.labels), others)
    member = np.r_[np.ones(len(forget.labels)), np.zeros(int(unseen.sum()))]
    loss = np.r_[attack_features(forget.logits, forget.labels)[:, 0], attack_features(*others)[:, 0]]
    rates, hits, _ = roc_curve(member, -loss)
    grid = np.linspace(0, 1, POINTS)
    reading: Reading = {
        "auc": found.auc,
        "tpr_at_1pct_fpr": found.tpr_at_1pct_fpr,
        "loss_auc": float(roc_auc_score(member, -loss)),
        "loss_roc": np.interp(grid, rates, hits).tolist(),
    }
    if len(exam.references) >= 2:
        apart = torch.stack([_likelihood(one.forget, one.test, unseen) for one in exam.references]).mean(0)
        ratio = _likelihood(forget, test, unseen) / apart.clamp_min(1e-12)
        reading["rmia_auc"] = float(roc_auc_score(member, ratio.numpy()))
    return reading


def _likelihood(forget: Outputs, test: Outputs, unseen: Tensor) -> Tensor:
    """Probability of the true label: forgotten training rows, then unseen ones."""
    logits = torch.cat([forget.logits, test.logits[unseen]]).double()
    labels = torch.cat([forget.labels, test.labels[unseen]])
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]
