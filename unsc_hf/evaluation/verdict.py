"""Results of one model beside others: the row of the table, the table, and the verdict in the words that are allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

LABELS = {
    "original": "original",
    "masked": "forgotten logit masked",
    "random_projector": "random projector, same rank",
    "unprojected": "no projection",
    "unsc": "UNSC",
    "retrained": "retrained",
}


COLUMNS = {
    "AccDut": "AccDut",
    "AccDrt": "AccDrt",
    "AccDf": "AccDf",
    "AccDr": "AccDr",
    "mia_auc": "MIA AUC",
    "probe_forget": "linear probe",
    "prototype_attack_10": "10-shot prototype",
    "leak": "leak",
    "seconds": "seconds",
}


FAR = 2.0  # standard deviations from the retrained models' mean that still count as within their band


LEAST_BAND = 0.01  # half the width that a band has at least: one point


@dataclass(frozen=True)
class MethodResult:
    """Row of the comparison; shares, None where a value cannot be given.

    Attributes:
        AccDf, AccDr: macro accuracy on training rows to forget / to keep (up to 500 rows of each class).
        AccDut, AccDrt: macro test accuracy on the forgotten / the remaining classes.
        mia_auc, mia_tpr_at_1pct_fpr: membership inference on the forgotten rows; 0.5 and 0.01 are chance.
        probe_forget: test accuracy on the forgotten classes of a new linear head on the model's features.
        prototype_attack_10: test accuracy on them when 10 examples of each are written into the head.
        leak: relative change of layer outputs on held-out retained rows.
        seconds: what making this model cost, from the original (retrained: from nothing).
        per_class: test accuracy by class id.
    """

    AccDf: float | None
    AccDr: float | None
    AccDut: float | None
    AccDrt: float | None
    mia_auc: float | None
    mia_tpr_at_1pct_fpr: float | None
    probe_forget: float | None
    prototype_attack_10: float | None
    leak: float | None
    seconds: float | None
    per_class: dict[int, float]


def mean_result(results: Sequence[MethodResult]) -> MethodResult:
    """Mean of several models' results, field by field; None where no model has a value."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    fields = [name for name in asdict(results[0]) if name != "per_class"]
    classes = results[0].per_class
    per_class = {c: float(np.mean([result.per_class[c] for result in results])) for c in classes}
    return MethodResult(
        **{name: mean([getattr(result, name) for result in results]) for name in fields}, per_class=per_class
    )


def within_band(value: float, band: Sequence[float]) -> bool:
    """Whether a share lies within two standard deviations of several retrained models' mean, or within a point of it.

    Few models may agree by chance to less than one test row, so their band is never taken to be narrower than one point.
    """
    mean, spread = float(np.mean(band)), float(np.std(band, ddof=1))
    return math.isfinite(value) and abs(value - mean) <= max(FAR * spread, LEAST_BAND) + 1e-9


def judge(
    unsc: MethodResult, references: Sequence[MethodResult], forgotten: Sequence[int], forgotten_at: float = 0.01
) -> tuple[str, str]:
    """Verdict and its reason.

    "suppressed": the output is gone. "removed": besides, probe and prototype attack lie within two standard deviations
    of several (at least three) retrained models. "not forgotten": test accuracy on one of the forgotten classes is above
    1 %. Where single rows of remaining classes were to be forgotten, accuracy on them and the membership attack are held
    against the retrained models instead; that says nothing of the features, so never more than "suppressed".
    """
    if not forgotten:
        return _judge_rows(unsc, references)
    if unsc.AccDut is None:
        return "not judged", "no test rows of the forgotten classes were given"
    worst = max([unsc.AccDut, *(unsc.per_class[c] for c in forgotten if c in unsc.per_class)])
    if worst > forgotten_at:
        return "not forgotten", f"test accuracy on the forgotten class that is best remembered is still {worst:.1%}"
    if len(references) < 3:
        return "suppressed", f"saying more needs at least three retrained models, {len(references)} given"
    outside = _outside(
        unsc, references, {"probe_forget": "linear probe", "prototype_attack_10": "10-shot prototype attack"}
    )
    if outside:
        return "suppressed", "; ".join(outside)
    return (
        "removed",
        f"linear probe and prototype attack lie within two standard deviations of {len(references)} retrained models",
    )


def _judge_rows(unsc: MethodResult, references: Sequence[MethodResult]) -> tuple[str, str]:
    if len(references) < 3:
        return (
            "not judged",
            f"single rows can only be held against at least three retrained models, {len(references)} given",
        )
    outside = _outside(unsc, references, {"AccDf": "accuracy on the rows", "mia_auc": "membership attack (AUC)"})
    if outside:
        return "not forgotten", "; ".join(outside)
    return (
        "suppressed",
        f"accuracy on the rows and the membership attack lie within two standard deviations of {len(references)} "
        "retrained models; the features were not examined",
    )


def _outside(unsc: MethodResult, references: Sequence[MethodResult], measures: Mapping[str, str]) -> list[str]:
    """What lies more than two standard deviations from the retrained models, in words."""
    outside = []
    for name, text in measures.items():
        value = getattr(unsc, name)
        band = [getattr(reference, name) for reference in references]
        mean, spread = float(np.mean(band)), float(np.std(band, ddof=1))
        if not within_band(value, band):
            outside.append(f"the {text} reads {value:.1%}, retrained models {mean:.1%} ± {spread:.1%}")
    return outside


def format_table(methods: Mapping[str, MethodResult]) -> list[list[str]]:
    """The comparison as text cells, first the header: accuracies and attacks in percent."""
    rows = [["model", *COLUMNS.values()]]
    for name, result in methods.items():
        cells = [LABELS[name]]
        for column in COLUMNS:
            value = getattr(result, column)
            if value is None:
                cells.append("–")
            elif column == "mia_auc":
                cells.append(f"{value:.3f}")
            elif column == "seconds":
                cells.append(f"{value:.0f}")
            elif column == "leak":
                cells.append(f"{100 * value:.2g}")
            else:
                cells.append(f"{100 * value:.1f}")
        rows.append(cells)
    return rows
