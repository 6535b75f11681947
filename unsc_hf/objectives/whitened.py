"""Whitened matching: the forgotten rows of a pseudo-label are pulled to the retained rows of that class, in the coordinates that
whiten the latter: a Fisher criterion, which counts a difference as a linear probe does, by how much it stands out of what the
class varies by, where plain squared error looks only at the large directions. (Moment matching: Sun and Saenko, "Deep CORAL", arXiv
1607.01719; unbiased form: Gretton et al., JMLR 13, 2012, lemma 6.)"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .terms import Terms
from .unsc import unsc


def whitened_means(terms: Terms) -> Tensor:
    """UNSC's loss plus the weighted squared distance of the class means, whitened."""
    return unsc(terms) + terms.feature_weight * mean_distance(terms)


def whitened_covariances(terms: Terms) -> Tensor:
    """As `whitened_means`, plus the mean squared deviation of the whitened variances from one."""
    return unsc(terms) + terms.feature_weight * (mean_distance(terms) + variance_distance(terms))


def mean_distance(terms: Terms) -> Tensor:
    """Squared norm of the mean of the whitened rows of each pseudo-label, by its share of rows.

    Unbiased: products of two different rows alone. The plain square of a batch's mean would mostly be its noise, and pull the
    rows of a class together.
    """
    total = terms.logits.new_zeros(())
    for rows, share in _whitened(terms):
        n = len(rows)
        total = total + share * (rows.sum(0).square().sum() - rows.square().sum()) / (n * (n - 1))
    return total


def variance_distance(terms: Terms) -> Tensor:
    """Mean squared difference of the variances of the whitened rows from one, by share of rows."""
    total = terms.logits.new_zeros(())
    for rows, share in _whitened(terms):
        total = total + share * (rows.var(0) - 1).square().mean()
    return total


def _whitened(terms: Terms) -> Iterator[tuple[Tensor, float]]:
    """Rows of each pseudo-label with two or more, less the class's mean and whitened, and their share of the batch."""
    features, targets = terms.need_features()
    groups = terms.groups()
    for label in torch.unique(groups).tolist():
        rows = features[groups == label]
        if len(rows) > 1 and label in targets.means:
            yield (rows.float() - targets.means[label]) @ targets.whitening[label], len(rows) / len(groups)
