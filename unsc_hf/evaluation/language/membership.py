"""Was a text in the training data? Scores of one text each, and how well they tell two sets apart.

Every score is smaller for a text that the model has more likely been trained on. The definitions are those of
open-unlearning (arXiv 2506.12618). The attack by loss is a row's mean loss itself (Yeom et al., arXiv 1709.01604).
"""

from __future__ import annotations

import zlib

import numpy as np
from sklearn.metrics import roc_auc_score

from .knowledge import Floats

SHARE = 0.4  # k of min-k and min-k++


def min_k(log_probs: Floats, share: float = SHARE) -> float:
    """Mean loss of the least likely `share` of the tokens, at least one (Shi et al., arXiv 2310.16789, equation 1).

    Args:
        log_probs: of the tokens, without the end-of-text token.
        share: of tokens that count.
    """
    return -float(np.sort(log_probs)[: max(1, int(len(log_probs) * share))].mean())


def min_k_plus_plus(log_probs: Floats, mean: Floats, variance: Floats, share: float = SHARE) -> float:
    """`min_k` of log-probabilities in units of what the model expects (Zhang et al., arXiv 2404.02936, equation 3).

    Args:
        log_probs: of the tokens, without the end-of-text token.
        mean, variance: of log p(x) for x drawn from the model's distribution at each token.
        share: of tokens that count.
    """
    deviation = np.sqrt(np.maximum(variance, 1e-6))
    return min_k((np.asarray(log_probs) - np.asarray(mean)) / deviation, share)


def zlib_ratio(loss: float, text: str) -> float:
    """Loss over the bytes of the compressed text (Carlini et al., arXiv 2012.07805, section 5.2)."""
    return loss / len(zlib.compress(text.encode("utf-8")))


def reference_difference(loss: float, reference_loss: float) -> float:
    """Loss less that of a model which was not trained on the text (Carlini et al., arXiv 2012.07805, section 5.2)."""
    return loss - reference_loss


def auc(forget: Floats, unseen: Floats) -> float:
    """Chance that a row to forget has a smaller score than an unseen one; 0.5 when the two look alike."""
    labels = np.repeat([0, 1], [len(forget), len(unseen)])
    return float(roc_auc_score(labels, np.concatenate([forget, unseen])))


def privleak(auc: float, retrained: float = 0.5) -> float:
    """How far an unlearned model's AUC is from a retrained one's, in percent (MUSE, arXiv 2407.06460, section 3).

    MUSE counts the AUC from the other side, so both are taken from 1. Far below 0 the rows are still known; far above 0
    they stand out by being known too badly.

    Args:
        auc: of the `min_k` scores of the unlearned model.
        retrained: of a model trained without the rows.
    """
    return 100 * (retrained - auc) / (1 - retrained + 1e-10)
