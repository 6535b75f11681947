"""The band that retrained models give, and the strength of erasure that reaches it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import learned, make_vit
from helpers.rows import Draw
from helpers.training import make_trainer

from unsc_hf import UNSCConfig, UNSCError, split_dataset
from unsc_hf.comparison.controls import compare
from unsc_hf.erasure.bands import ProbeBands, choose_strength
from unsc_hf.erasure.eraser import Attempt
from unsc_hf.erasure.readings import Reading
from unsc_hf.evaluation.verdict import Band

BAND = Band(0.5, 0.1)


def test_band_is_two_standard_deviations_but_never_narrower_than_a_point() -> None:
    assert Band.of([0.4, 0.5, 0.6]) == Band(pytest.approx(0.5), pytest.approx(0.2))
    assert Band.of([0.4, 0.4]).reach == 0.01
    assert Band.of([0.4, 0.6]).distance(0.5) == pytest.approx(0)
    for values in ([0.4], [0.4, float("nan")]):
        with pytest.raises(UNSCError, match="references: .* given; a band needs the readings of two"):
            Band.of(values)


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (lambda s: 0.9 - 0.8 * s, 0.5),  # bisected
        (lambda s: 0.53 - 0.1 * s, 0.35),  # inside at the start
        (lambda s: 0.9 - 0.1 * s, 1.0),  # out of reach: as near as can be
        (lambda s: 0.3 - 0.2 * s, 0.0),  # below already: nothing is erased
    ],
)
def test_strength_that_lands_in_the_band(read: Callable[[float], float], wanted: float) -> None:
    calls: list[float] = []

    def counted(strength: float) -> float:
        calls.append(strength)
        return read(strength)

    assert choose_strength(counted, BAND, 0.35) == pytest.approx(wanted, abs=0.13)
    assert len(calls) <= 5
    assert len(set(calls)) == len(calls)


def test_chosen_on_validation_rows_for_each_reading(separable_data: Draw, tmp_path: Path) -> None:
    train = separable_data(60)
    data = split_dataset(train, forget_classes=["frog"])
    references = [make_vit(), make_vit()]  # know nothing: what they read is the band
    trainer = make_trainer(learned(train), data, tmp_path, learning_rate=1e-3, energy=0.9, feature_erasure="layers")
    trainer.prepare_unlearning()
    bands = ProbeBands(trainer.model, trainer.feature_rows(), [lambda model=model: model for model in references])
    assert set(bands.bands) == {"head", "layer_01", "layer_02"}
    asked: list[str] = []

    def choose(reading: Reading, attempt: Attempt) -> float:
        asked.append(reading.name)
        return bands(reading, attempt)

    trainer.choose_erasure = choose
    trainer.train()
    assert asked == [one.reading for one in trainer.erased]
    assert asked[-1] == "head"


def test_bad_references(separable_data: Draw, tmp_path: Path) -> None:
    data = separable_data(40)
    apart = split_dataset(data, forget_classes=["frog"])
    trainer = make_trainer(make_vit(), apart, tmp_path, feature_erasure="layers", energy=0.9)
    trainer.prepare_unlearning()
    with pytest.raises(UNSCError, match=r"references: a retrained model has 2 places to read, the original 3"):
        ProbeBands(trainer.model, trainer.feature_rows(), [make_vit, lambda: make_vit(layers=1)])
    with pytest.raises(UNSCError, match="a band needs the readings of two"):
        ProbeBands(trainer.model, trainer.feature_rows(), [make_vit])
    single = make_trainer(make_vit(), (data.select(range(5)), data.select(range(5, 120))), tmp_path, energy=0.9)
    with pytest.raises(UNSCError, match="bands of a probe need whole classes"):
        ProbeBands(single.model, single.feature_rows(), [make_vit, make_vit])


@pytest.mark.parametrize(("rows", "fewest", "wanted"), [(4_000, 25, None), (60, 5, 20), (60, 25, 25)])
def test_a_probe_of_many_classes_is_taught_on_fewer_rows_of_each(
    rows: int, fewest: int, wanted: int | None, separable_data: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unsc_hf.erasure.bands.ROWS", rows)
    monkeypatch.setattr("unsc_hf.erasure.bands.FEWEST_ROWS", fewest)
    data = split_dataset(separable_data(40), forget_classes=["frog"])
    trainer = make_trainer(make_vit(), data, tmp_path, feature_erasure="head", energy=0.9)
    parts = trainer.feature_rows()
    bands = ProbeBands(trainer.model, parts, [], {"head": BAND})
    counts = torch.bincount(torch.cat([batch["labels"] for batch in bands.taught_on])).tolist()
    every = [len(parts.retain) // 2] * 2 + [len(parts.forget)]
    assert counts == [min(number, wanted or number) for number in every]


def test_a_comparison_with_retrained_models_chooses_by_their_band(
    separable_data: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = separable_data(60), separable_data(20)
    folders = [tmp_path / f"without-{i}" for i in range(2)]
    for folder in folders:
        make_vit().save_pretrained(folder)
    config = UNSCConfig(
        output_dir=str(tmp_path / "out"), energy=0.9, max_steps=20, learning_rate=1e-3, use_cpu=True, disable_tqdm=True,
        feature_erasure="head", report_to="none", max_leak=None,
    )  # fmt: skip
    chosen: list[float] = []
    choose = ProbeBands.__call__

    def noted(self: ProbeBands, *parts: Any) -> float:
        chosen.append(choose(self, *parts))
        return chosen[-1]

    monkeypatch.setattr(ProbeBands, "__call__", noted)
    result = compare(learned(train), train, test, ["frog"], config, None, folders, controls=False)
    assert [one.strength for one in result.trainer.erased] == pytest.approx(chosen)
    assert result.methods["unsc"].leak == pytest.approx(result.certificate["leak"])
