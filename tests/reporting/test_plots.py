"""Pictures are drawn for odd inputs too, and whole or not at all."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from unsc_hf.reporting.plots import STYLE, plot_answered, plot_methods, plot_per_class, plot_trade_off, plot_unlearning


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_per_class(classes: int, tmp_path: Path) -> None:
    series = {name: {c: float(torch.rand(())) for c in range(classes)} for name in ("before", "after", "retrained")}
    names = ["$x^2$", "a very long class name indeed, with commas", *map(str, range(classes - 2))]
    path = plot_per_class(series, names, [0], tmp_path / "p.png")
    assert Image.open(path).size[0] > 500
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_unlearning(tmp_path: Path) -> None:
    history = [{"step": s, "leak": 0.001 * s, "retain_accuracy": 0.9, "forget_accuracy": 1 / (1 + s)} for s in range(5)]
    plot_unlearning([*history, {"loss": 1.0, "step": 5}], 0.05, tmp_path / "u.png")
    assert [p.name for p in tmp_path.iterdir()] == ["u.png"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, which are not written."""
    figures: list[Figure] = []
    monkeypatch.setattr("unsc_hf.reporting.plots.save", lambda figure, path: figures.append(figure))
    return figures


def test_where_forgotten_rows_go(drawn: list[Figure], tmp_path: Path) -> None:
    answers = {"before": {2: {2: 0.9, 0: 0.1}}, "after": {2: {0: 0.75, 1: 0.25}}}
    plot_answered(answers, ["cat", "dog", "frog"], tmp_path / "a.png")
    axes = drawn[0].axes[0]
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["cat", "dog", "frog", "others"]
    assert [cells[0, j] for j in range(4)] == ["10", "0", "90", "0"]
    assert [cells[1, j] for j in range(4)] == ["75", "25", "0", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["frog, before", "frog, after"]


def test_answers_beyond_the_columns_are_added_up(drawn: list[Figure], tmp_path: Path) -> None:
    plot_answered({"after": {0: dict.fromkeys(range(20), 0.05)}}, [str(c) for c in range(20)], tmp_path / "a.png")
    assert drawn[0].axes[0].texts[-1].get_text() == "60"


def test_methods_are_named_beside_their_points(drawn: list[Figure], tmp_path: Path) -> None:
    points = {
        "masked logits": (0.0, 0.9),
        "UNSC": (0.006, 0.88),
        "retrained": (0.018, 0.5),
        "no projection": (0.014, 0.9),
    }
    plot_methods(points, tmp_path / "m.png")
    names = drawn[0].axes[0].texts
    assert {text.get_text() for text in names} == set(points)
    heights = sorted(text.xyann[1] for text in names)
    assert all(above - below >= 9 for below, above in pairwise(heights))
    for text in names:
        assert text.xy == pytest.approx([100 * x for x in points[text.get_text()]])


def test_ink_is_read_on_white_and_on_black(tmp_path: Path) -> None:
    def brightness(colour: tuple[float, float, float]) -> float:
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    path = plot_methods({"UNSC": (0.01, 0.5)}, tmp_path / "m.png")
    image = Image.open(path)
    assert image.mode == "RGBA"
    assert image.getpixel((1, 1))[3] == 0  # no ground
    ink = brightness(to_rgb(STYLE["text.color"]))
    for ground in (1.0, brightness(to_rgb("#12171c"))):
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 3.5


def test_forget_quality_stands_against_utility_and_changed_tokens(drawn: list[Figure], tmp_path: Path) -> None:
    models = {
        "original": SimpleNamespace(forget_quality=0.0, model_utility=0.6, flips=None),
        "unsc_retain": SimpleNamespace(forget_quality=0.3, model_utility=0.5, flips=0.02),
        "unsc_retain unprojected": SimpleNamespace(forget_quality=0.2, model_utility=0.1, flips=0.5),
    }
    plot_trade_off(models, tmp_path / "t.png")
    left, right = drawn[0].axes
    places = [[tuple(points.get_offsets()[0]) for points in axes.collections[:3]] for axes in (left, right)]
    assert places == [[(0.6, 1e-30), (0.5, 0.3), (0.1, 0.2)], [(0.0, 1e-30), (2.0, 0.3), (50.0, 0.2)]]
    assert [len(points.get_facecolors()) for points in left.collections] == [1, 1, 0, 0], "no projection is hollow"
    assert left.collections[1].get_edgecolors().tolist() == left.collections[2].get_edgecolors().tolist()
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["original", "UNSC retain", "hollow: no projection"]
