"""One verdict for single runs and comparisons: which words are allowed, and where each begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.results import method_result

from unsc_hf import UNSCError
from unsc_hf.comparison.summary import against, false_alarms, half_interval, judge_method
from unsc_hf.evaluation.audits import AUDITS
from unsc_hf.evaluation.verdict import Band, Evidence, audits_outside, judge, mean_result
from unsc_hf.reporting.tables import classifier_table

BAND = (0.50, 0.52, 0.54, 0.52)


def model(accuracy: float = 0.0, **audits: float | None) -> Evidence:
    titles = {"probe": "linear probe", "attack": "membership attack"}
    return Evidence({0: 0.9, 1: 0.0, 2: accuracy}, {titles[name]: value for name, value in audits.items()})


def references(*numbers: float) -> list[Evidence]:
    return [model(probe=number) for number in numbers]


def record(accuracy: float = 0.0, **audits: float) -> dict[str, Any]:
    """What a comparison keeps of a model."""
    named = {name: {AUDITS[name].headline or "": value} for name, value in audits.items()}
    return {"AccDut": accuracy / 2, "AccDrt": 0.9, "per_class": {"0": 0.9, "1": 0.0, "2": accuracy}, "audits": named}


@pytest.mark.parametrize(
    ("evidence", "retrained", "word"),
    [
        (model(probe=0.53), references(*BAND), "removed"),
        (model(0.01, probe=0.53), references(*BAND), "removed"),  # 1 % is forgotten
        (model(0.02, probe=0.53), references(*BAND), "not forgotten"),  # the mean over both classes is 1 %
        (model(probe=0.7), references(*BAND), "suppressed"),
        (model(probe=0.2), references(*BAND), "suppressed"),  # over-erasure
        (model(probe=0.53), references(0.53, 0.53, 0.53), "removed"),
        (model(probe=0.53), references(0.53, 0.53), "suppressed"),  # two never say "removed"
        (model(probe=0.53), [], "suppressed"),
        (model(), references(*BAND), "suppressed"),  # what the references have is missing
        (model(probe=float("nan")), references(*BAND), "suppressed"),
        (model(probe=0.53), [model(), *references(0.53, 0.53)], "suppressed"),  # an audit of two references
        (model(probe=0.53), references(*[float("nan")] * 4), "suppressed"),  # an audit that says nothing
        (model(probe=0.53, attack=0.9), [model(probe=0.53, attack=0.5)] * 3, "suppressed"),  # every audit counts
        (model(attack=0.5), [model(attack=0.5)] * 3, "suppressed"),  # nothing examined the features
        (Evidence({0: 0.9}, model(probe=0.53).audits), references(*BAND), "not judged"),  # no test rows
    ],
)
def test_words_and_their_limits(evidence: Evidence, retrained: list[Evidence], word: str) -> None:
    assert judge(evidence, retrained, [1, 2]).word == word


def test_the_band_is_two_sample_standard_deviations_and_at_least_a_point() -> None:
    numbers = [0.4, 0.5, 0.6]  # sample standard deviation 0.1, that of a population 0.0816
    for value, inside in ((0.69, True), (0.71, False), (0.67, True), (0.31, True), (0.29, False)):
        assert Band.of(numbers).holds(value) is inside
        assert (judge(model(probe=value), references(*numbers), [2]).word == "removed") is inside
    assert Band.of([0.5, 0.51, 0.52]).holds(0.52)
    assert Band.of(numbers).distance(0.3) == pytest.approx(1.0)
    assert Band.of([0.4, 0.6]).mean == pytest.approx(0.5)
    for few in ([0.5], [0.5, 0.6, float("nan")]):
        with pytest.raises(UNSCError, match="a band needs the readings of two retrained models or more"):
            Band.of(few)
    assert Band.of([0.5] * 3).holds(0.509)
    assert not Band.of([0.5] * 3).holds(0.511)
    assert audits_outside(model(probe=0.71), references(*numbers)) == {
        "linear probe": "the linear probe reads 71.0%, retrained models 50.0% ± 10.0%"
    }


def test_single_rows_are_compared_by_what_the_model_says_of_them() -> None:
    def rows(accuracy: float, auc: float) -> Evidence:
        return method_result(AccDf=accuracy, mia_auc=auc, probe_forget=None).evidence([])

    band = [rows(a, 0.5) for a in (0.80, 0.82, 0.84)]
    assert judge(rows(0.82, 0.5), band, []).word == "suppressed"
    assert "features were not examined" in judge(rows(0.82, 0.5), band, []).reason
    assert judge(rows(0.95, 0.5), band, []).outside == ["accuracy on the rows"]
    assert judge(rows(0.82, 0.6), band, []).word == "not forgotten"
    assert judge(rows(0.82, 0.5), band[:2], []).word == "not judged"


def test_a_run_and_a_comparison_say_the_same_of_the_same_model() -> None:
    for accuracy, auc, probe, word in (
        (0.0, 0.5, 0.53, "removed"),
        (0.0, 0.6, 0.53, "suppressed"),
        (0.0, 0.5, 0.7, "suppressed"),
        (0.02, 0.5, 0.53, "not forgotten"),
    ):
        numbers = [(number, 0.5) for number in BAND]
        ours, *retrained = (
            replace(
                method_result(probe_forget=p, mia_auc=a, prototype_attack_10=p), per_class={0: 0.9, 1: 0.0, 2: accuracy}
            )
            for p, a in [(probe, auc), *numbers]
        )
        verdict = judge(ours.evidence([1, 2]), [one.evidence([1, 2]) for one in retrained], [1, 2])
        others = [record(membership=a, probe=p, prototype=p) for p, a in numbers]
        mine = record(accuracy, membership=auc, probe=probe, prototype=probe)
        assert judge_method([mine], others, [1, 2]) == (verdict.word, verdict.outside)
        assert verdict.word == word


def test_a_method_is_judged_by_its_weakest_model() -> None:
    others = [record(probe=number) for number in BAND]
    good, read, known = record(probe=0.52), record(probe=0.7), record(0.02, probe=0.52)
    assert judge_method([good, good], others, [1, 2]) == ("removed", [])
    assert judge_method([good, read], others, [1, 2]) == ("suppressed", ["linear probe"])
    assert judge_method([good, read, known], others, [1, 2])[0] == "not forgotten"
    assert judge_method([good], others[:2], [1, 2]) == ("suppressed", [])


def test_false_alarms_are_counted_with_each_reference_held_out() -> None:
    def of(*numbers: float) -> list[dict[str, Any]]:
        return [record(probe=x) for x in numbers]

    assert false_alarms(of(0.5, 0.5, 0.5), "probe.head") is None
    assert false_alarms(of(0.4, 0.6, 0.4, 0.6), "probe.head") == pytest.approx(0.0)
    assert false_alarms(of(0.50, 0.51, 0.49, 0.90), "probe.head") == pytest.approx(0.25)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(int(torch.randint(2**31, ()).item()))
    draws = rng.normal(0.3, 2.0, (2000, 3))
    hits = [abs(row.mean() - 0.3) <= (half_interval(row.tolist()) or 0.0) for row in draws]
    assert 0.93 < np.mean(hits) < 0.97
    assert half_interval([0.4]) is None
    runs = {
        "unsc": [{**record(), "AccDrt": a} for a in (0.92, 0.93)],
        "scrub": [{**record(), "AccDrt": a} for a in (0.9, 0.91)],
    }
    gap = against(runs, "scrub")
    assert gap == pytest.approx((0.02, 0.0), abs=1e-9)
    assert against(runs, "unsc") is None


def test_means_and_table() -> None:
    mean = mean_result([method_result(probe_forget=0.4, leak=None), method_result(probe_forget=0.6, leak=None)])
    assert mean.probe_forget == pytest.approx(0.5)
    assert mean.leak is None
    one = replace(method_result(probe_forget=0.4), answers={2: {0: 0.25, 1: 0.75}})
    assert mean_result([one]) == one
    header, *rows = classifier_table(
        {"masked": mean, "random_projector": mean, "unprojected": mean, "retrained": mean}
    ).cells
    assert header[:3] == ["model", "accuracy on forgotten", "accuracy on kept"]
    assert [row[0] for row in rows] == ["masked logits", "random subspace", "no projection", "retrained"]
    assert rows[0][header.index("readable by a probe")] == "50 %"
    assert rows[0][header.index("leak")] == "–"
