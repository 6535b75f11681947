"""An adversarial probe: whatever linear reader tells the forgotten rows from the retained classes now, its answer on them shall be
their pseudo-label. (Domain-adversarial training: Ganin et al., arXiv 1505.07818; here the adversary is fitted anew at each step, in
closed form, so there is no second optimiser and nothing to save with a checkpoint.)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import Terms
from .unsc import unsc


def adversarial_probe(terms: Terms) -> Tensor:
    """UNSC's loss plus the weighted loss of a probe that shall take the forgotten rows for retained ones of their pseudo-label.

    The probe of a class is Fisher's linear discriminant between its retained rows (their mean, and the pooled covariance of the
    original model) and the forgotten rows that are re-labelled to it. One half of the batch teaches it what those look like, the other
    is asked, and the other way round: rows that had a part in their own mean would look far too easy to tell.
    """
    features, _ = terms.need_features()
    halves = torch.arange(len(features), device=features.device) % 2 == 0
    return unsc(terms) + terms.feature_weight * (_asked(terms, features, halves) + _asked(terms, features, ~halves)) / 2


def _asked(terms: Terms, features: Tensor, taught: Tensor) -> Tensor:
    """Mean of log(1 + odds of being a forgotten row) over the rows that did not teach the probe; it gets no gradient itself."""
    _, targets = terms.need_features()
    groups = terms.groups()
    losses = []
    for label in torch.unique(groups[~taught]).tolist():
        teachers = features[taught & (groups == label)]
        if label not in targets.means or len(teachers) == 0:
            continue
        with torch.no_grad():
            apart = teachers.float().mean(0) - targets.means[label]
            direction = targets.precision @ apart
            middle = targets.means[label] + apart / 2
        rows = features[~taught & (groups == label)].float()
        losses.append(F.softplus((rows - middle) @ direction))
    return torch.cat(losses).mean() if losses else features.new_zeros(())
