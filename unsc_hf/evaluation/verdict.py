"""Results of one model beside others, and the one verdict on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ..errors import UNSCError

LABELS = {
    "original": "original",
    "masked": "masked logits",
    "random_projector": "random subspace",
    "unprojected": "no projection",
    "unsc": "UNSC",
    "retrained": "retrained",
}

FORGOTTEN = 0.01  # test accuracy at or below which a class counts as forgotten
FEWEST_REFERENCES = 3  # retrained models below which nothing is said about the features
FAR = 2.0  # sample standard deviations from the retrained models' mean that still lie within their band
LEAST_BAND = 0.01  # half the width of a band is at least one point
WORDS = ("not judged", "not forgotten", "suppressed", "removed")  # verdicts, the weakest first

_UNEXAMINED = "the features were not examined"
ROW_ACCURACY = "accuracy on the rows"
MEMBERSHIP = "membership attack"
FEATURES = ("linear probe", "10-shot prototype attack")  # audits that examine the features


@dataclass(frozen=True)
class Evidence:
    """What a verdict on one model rests on."""

    per_class: Mapping[int, float]  #: test accuracy by class id
    audits: Mapping[str, float | None]  #: headline number by title; None or NaN where the audit says nothing


@dataclass(frozen=True)
class Verdict:
    """One of `WORDS`, a sentence that says why, and the audits outside the band of the retrained models."""

    word: str
    reason: str
    outside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MethodResult:
    """Row of the comparison; shares, None where a value cannot be given."""

    AccDf: float | None  #: macro accuracy on training rows to forget (a sample, see `engine.sample_rows`)
    AccDr: float | None  #: the same on training rows to keep
    AccDut: float | None  #: macro test accuracy on the forgotten classes
    AccDrt: float | None  #: macro test accuracy on the remaining classes
    mia_auc: float | None  #: membership inference on the forgotten rows; 0.5 is chance
    mia_tpr_at_1pct_fpr: float | None  #: the same; 0.01 is chance
    probe_forget: float | None  #: test accuracy on the forgotten classes of a new linear head on the model's features
    prototype_attack_10: float | None  #: the same when 10 examples of each class are written into the head
    leak: float | None  #: relative change of layer outputs on held-out retained rows
    seconds: float | None  #: what making this model cost, from the original (retrained: from nothing)
    per_class: dict[int, float]  #: test accuracy by class id
    flips: float | None = None  #: kept test rows whose decision among the remaining classes is not the original's
    negative_flips: float | None = None  #: those that the original answered rightly and this model does not
    drift: float | None = None  #: relative change of the remaining logits on the same rows
    answers: dict[int, dict[int, float]] | None = None  #: by forgotten class id, the share of its test rows by answer

    def evidence(self, forgotten: Sequence[int]) -> Evidence:
        """What a verdict rests on; for single rows (no class is `forgotten` whole) nothing about the features."""
        if not forgotten:
            return Evidence(self.per_class, {ROW_ACCURACY: self.AccDf, MEMBERSHIP: self.mia_auc})
        features = dict(zip(FEATURES, (self.probe_forget, self.prototype_attack_10), strict=True))
        return Evidence(self.per_class, {MEMBERSHIP: self.mia_auc, **features})


def mean_result(results: Sequence[MethodResult]) -> MethodResult:
    """Mean of several models' results, field by field; None where no model has a value."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    fields = [name for name in asdict(results[0]) if name not in ("per_class", "answers")]
    classes = results[0].per_class
    per_class = {c: float(np.mean([result.per_class[c] for result in results])) for c in classes}
    given = [result.answers for result in results if result.answers]
    answers = {
        c: {n: sum(one[c].get(n, 0.0) for one in given) / len(given) for n in set().union(*(one[c] for one in given))}
        for c in (given[0] if given else ())
    }
    return MethodResult(
        **{name: mean([getattr(result, name) for result in results]) for name in fields}, per_class=per_class,
        answers=answers or None,
    )  # fmt: skip


@dataclass(frozen=True)
class Band:
    """What retrained models read: the target of forgetting is a band, and less than it is over-erasure."""

    mean: float
    reach: float  #: two standard deviations, at least a point: few models may agree by chance to less than a test row

    @classmethod
    def of(cls, values: Sequence[float]) -> Band:
        """From the readings of retrained models; UNSCError for fewer than two, or one that is not a number."""
        if len(values) < 2 or not np.isfinite(values).all():
            raise UNSCError(
                f"references: {list(values)} given; a band needs the readings of two retrained models or more."
            )
        return cls(float(np.mean(values)), max(FAR * float(np.std(values, ddof=1)), LEAST_BAND))

    def distance(self, value: float) -> float:
        """How far a reading lies from the mean, in units of the reach: within 1 it is inside."""
        return abs(value - self.mean) / self.reach

    def holds(self, value: float) -> bool:
        """Whether a reading is a number that lies within reach of the mean."""
        return math.isfinite(value) and abs(value - self.mean) <= self.reach + 1e-9


def judge(model: Evidence, references: Sequence[Evidence], forgotten: Sequence[int]) -> Verdict:
    """The verdict on one model.

    "not forgotten": the test accuracy of some forgotten class is above 1 %. "suppressed": none is, so the output is
    gone. "removed": besides, every available audit lies within the band of at least three retrained models, and one of
    them examines the features. "not judged": there are no test rows of the forgotten classes.

    Single rows of remaining classes are compared with the retrained models by their accuracy and a membership attack
    alone. That says nothing about the features, so the verdict is at most "suppressed".

    `references` are retrained without the forgotten rows; `forgotten` is empty where single rows are forgotten.
    """
    available, outside = available_audits(references), audits_outside(model, references)
    apart = ("; ".join(outside.values()), list(outside))
    more = f"needs an audit of at least {FEWEST_REFERENCES} retrained models, {len(references)} given"
    inside = f"{', '.join(available)}: all within two standard deviations of {len(references)} retrained models"
    if not forgotten:
        if not available:
            return Verdict("not judged", f"a verdict on single rows {more}")
        return Verdict("not forgotten", *apart) if outside else Verdict("suppressed", f"{inside}; {_UNEXAMINED}")
    accuracies = [model.per_class[c] for c in forgotten if c in model.per_class]
    if not accuracies:
        return Verdict("not judged", "no test rows of the forgotten classes were given")
    if max(accuracies) > FORGOTTEN:
        reason = f"test accuracy on the forgotten class that the model knows best is still {max(accuracies):.1%}"
        return Verdict("not forgotten", reason, list(outside))
    if not available:
        return Verdict("suppressed", f"saying more {more}")
    if outside:
        return Verdict("suppressed", *apart)
    examined = set(FEATURES) & set(available)
    return Verdict("removed", inside) if examined else Verdict("suppressed", f"{inside}; {_UNEXAMINED}")


def available_audits(references: Sequence[Evidence]) -> dict[str, list[float]]:
    """Numbers of the retrained models by audit, of the audits that have one for at least three of them."""
    titles = dict.fromkeys(title for reference in references for title in reference.audits)
    bands = {title: [reference.audits.get(title) for reference in references] for title in titles}
    known = {title: [x for x in band if x is not None and math.isfinite(x)] for title, band in bands.items()}
    return {title: band for title, band in known.items() if len(band) >= FEWEST_REFERENCES}


def audits_outside(model: Evidence, references: Sequence[Evidence]) -> dict[str, str]:
    """The available audits in which a model lies outside the band of the retrained models, each with a sentence.

    An audit that says nothing about the model, although it does about the retrained models, counts as outside.
    """
    outside = {}
    for title, band in available_audits(references).items():
        value = model.audits.get(title)
        if value is None or not math.isfinite(value):
            outside[title] = f"the {title} could not be measured"
        elif not Band.of(band).holds(value):
            retrained = f"{np.mean(band):.1%} ± {np.std(band, ddof=1):.1%}"
            outside[title] = f"the {title} reads {value:.1%}, retrained models {retrained}"
    return outside
