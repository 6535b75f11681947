"""Pictures are drawn for odd inputs too, and whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.rules import build_subspace
from unsc_hf.reporting.plots import plot_capacity, plot_per_class, plot_unlearning


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_per_class(classes: int, tmp_path: Path) -> None:
    series = {name: {c: float(torch.rand(())) for c in range(classes)} for name in ("before", "after", "retrained")}
    names = ["$x^2$", "a very long class name indeed, with commas", *map(str, range(classes - 2))]
    path = plot_per_class(series, names, [0], tmp_path / "p.png")
    assert Image.open(path).size[0] > 500
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_unlearning_and_capacity(tmp_path: Path) -> None:
    history = [{"step": s, "leak": 0.001 * s, "retain_accuracy": 0.9, "forget_accuracy": 1 / (1 + s)} for s in range(5)]
    plot_unlearning([*history, {"loss": 1.0, "step": 5}], 0.05, tmp_path / "u.png")
    moment = SecondMoment.zeros(1, 6).update(torch.randn(1, 40, 6))
    space = build_subspace({"0": {"k": moment}}, {"layer": "k"}, energy=0.9, forget={"k": moment})
    plot_capacity(space.report(), tmp_path / "c.png")
    assert {p.name for p in tmp_path.iterdir()} == {"u.png", "c.png"}
