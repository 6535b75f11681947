"""How well a model knows answers: the metrics of TOFU and their aggregates, one pure function each.

The definitions are those of open-unlearning (arXiv 2506.12618), so that numbers can be compared. TOFU is arXiv
2401.06121.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp

from ...errors import UNSCError

Floats = Sequence[float] | np.ndarray
Flags = Sequence[bool] | np.ndarray

_TINY = 1e-10  # keeps quotients finite, as in open-unlearning


def probability(log_probs: Floats) -> float:
    """Probability of an answer to the power 1 / tokens, `P(a | q) ** (1 / |a|)` (TOFU, section 2.2.1).

    Args:
        log_probs: natural logarithms of the probabilities of its tokens, the end-of-text token included.
    """
    return float(np.exp(np.mean(log_probs)))


def normalised_probability(right: float, wrong: Floats) -> float:
    """Share of the right answer in the probabilities of all choices, P(a | q) / sum_i P(a_i | q) (TOFU, section 2.2.1).

    Args:
        right, wrong: `probability` of the right answer and of each wrong one.
    """
    return float(right / (right + np.sum(wrong) + _TINY))


def exact_memorization(recited: Flags) -> float:
    """Share of an answer's tokens that are the model's most likely ones (Tirumala et al., arXiv 2205.10770, section 3).

    Args:
        recited: for each token, without the end-of-text token, whether it is the most likely one after the true tokens
            before it.

    Raises:
        UNSCError: an answer without tokens.
    """
    return float(np.mean(_some(recited)))


def extraction_strength(recited: Flags) -> float:
    """Share of an answer that the model recites once it has the part before, `1 - k / |y|`.

    The recited part is the longest ending in which every token is the most likely one (Carlini et al., arXiv
    2012.07805; Wang et al., arXiv 2406.09179, equation 4). It counts at least one token, so `1 / |y|` is the smallest.

    Args:
        recited: as for `exact_memorization`.

    Raises:
        UNSCError: an answer without tokens.
    """
    wrong = np.flatnonzero(~np.asarray(_some(recited), dtype=bool))
    start = min(int(wrong[-1]) + 1, len(recited) - 1) if len(wrong) else 0
    return 1 - start / len(recited)


def _some(recited: Flags) -> Flags:
    if len(recited) == 0:
        raise UNSCError("recited: an answer has no token of its own; leave its row out.")
    return recited


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge(generation: str, truth: str) -> dict[str, float]:
    """ROUGE-1 recall, ROUGE-L F1 and ROUGE-L recall of a generated answer (Lin, 2004; TOFU, section 2.2.1).

    Words are stemmed, and consist of ASCII letters and digits, as in the library rouge-score.
    """
    scores = _scorer().score(truth, generation)
    return {
        "rouge1_recall": scores["rouge1"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rougeL_recall": scores["rougeL"].recall,
    }


def truth_ratio(right: Floats, wrong: Floats) -> float:
    """Probability of wrong answers to a question over that of right ones, R_truth (TOFU, equation 1).

    TOFU's code takes geometric means over answers, and so does this.

    Args:
        right, wrong: mean losses of the tokens of each right answer (mostly one paraphrase) and of each wrong one.
    """
    return float(np.exp(-np.mean(wrong)) / (np.exp(-np.mean(right)) + _TINY))


def truth_ratio_of_forgotten(ratios: Floats) -> float:
    """Mean of min(r, 1 / r): 1 when right and wrong answers are equally likely (TOFU, section 2.2.2)."""
    values = np.asarray(ratios)
    return float(np.minimum(values, 1 / (values + _TINY)).mean())


def truth_ratio_of_kept(ratios: Floats) -> float:
    """Mean of max(0, 1 - r): 1 when only right answers are likely (TOFU, section 2.2.1)."""
    return float(np.maximum(0, 1 - np.asarray(ratios)).mean())


def forget_quality(ratios: Floats, retrained: Floats) -> float:
    """p-value of a two-sample Kolmogorov-Smirnov test on truth ratios of forgotten rows (TOFU, section 2.2.2).

    Args:
        ratios: of the unlearned model.
        retrained: of a model trained without these rows. A large p-value says that the two are not told apart.
    """
    return float(ks_2samp(ratios, retrained).pvalue)


def model_utility(values: Floats) -> float:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on retained rows, authors and facts (TOFU, 2.2.1).

    It is 0 when any of the nine values is.
    """
    return float(hmean(np.asarray(values, dtype=np.float64)))


def perplexity(mean_loss: float) -> float:
    """exp of the mean loss of a token; infinite when that overflows."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
