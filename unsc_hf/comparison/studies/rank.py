"""How many directions to keep: rules, and what they leave of both accuracies."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ...reporting.plots import BLUE, GREEN, ORANGE
from .study import Lab, Point, Points, Study, legend, panels, register, zoom

_ENERGIES = (0.9, 0.95, 0.97, 0.99, 0.995, 0.999, 0.9999)
_SHARES = (0.125, 0.25, 0.5, 0.75)
_RATIOS = (0.5, 1.0, 1.5, 3.0)
_COLOURS = {"energy": BLUE, "rank": ORANGE, "ratio": GREEN}


@register
class RankStudy(Study):
    """Rules: `energy`, `rank` as shares of the narrowest layer, `ratio` of forgotten against retained energy."""

    name = "rank"
    title = "How many directions must be kept?"
    tags = {"rule": "rule", "setting": "setting"}
    numbers = {name: name for name in ("AccDut", "AccDrt", "leak", "steps")}

    def measure(self, lab: Lab) -> list[Point]:
        points = []
        for seed in lab.seeds:
            width = min(layer.geometry.width for layer in lab.experiment.bench(seed).plan.selection.layers)
            tried: list[tuple[str, float, dict[str, Any]]] = [
                *(("energy", energy, {"energy": energy}) for energy in _ENERGIES),
                *(("rank", share, {"subspace_size": max(1, round(share * width))}) for share in _SHARES),
                *(("ratio", ratio, {"subspace_size": ratio}) for ratio in _RATIOS),
            ]
            for rule, setting, options in tried:
                points.append(lab.run({"rule": rule, "setting": setting}, seed, {"subspace_rule": rule, **options}))
        return points

    def plot(self, points: Points) -> Figure:
        figure, axes = panels(2, 5.2)
        for one, key in zip(axes, ("AccDrt", "AccDut"), strict=True):
            heights: list[float] = []
            for i, (rule, colour) in enumerate(_COLOURS.items()):
                settings = points.where(rule=rule).by("setting")
                x, y = ([100 * runs.mean(k) for runs in settings.values()] for k in ("leak", key))
                bars = [100 * runs.half(key) for runs in settings.values()]
                one.errorbar(x, y, yerr=bars, fmt="o", ms=5, elinewidth=0.6, label=rule, color=colour)
                style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": colour}
                for place, setting in zip(zip(x, y, strict=True), settings, strict=True):
                    one.annotate(f"{setting:g}", place, xytext=(3, 4 + 9 * i), **style)
                heights += y
            zoom(one, heights)
            one.set(xlabel="held-out leak (%)", ylabel=f"{key} (%)")
        legend(axes[0], loc="lower right")
        return figure

    def paragraph(self, points: Points) -> str:
        best = []
        for rule in _COLOURS:
            settings = points.where(rule=rule).by("setting").items()
            kept = {setting: runs.mean("AccDrt") for setting, runs in settings if runs.mean("AccDut") <= 0.01}
            if kept:
                setting = max(kept, key=kept.__getitem__)
                best.append(f"{rule} {setting:g} keeps {100 * kept[setting]:.1f} %")
        text = (
            "Of the settings that forget (AccDut at most 1 %), the best of each rule on the test rows: "
            f"{'; '.join(best)}. "
        )
        stalled = sorted({f"{p['rule']} {p['setting']:g}" for p in points.where() if (p.get("AccDut") or 0) > 0.01})
        if stalled:
            text += f"At least one seed did not forget within its budgets at {', '.join(stalled)}. "
        failed = sorted({f"{p['rule']} {p['setting']:g}" for p in points if "error" in p})
        if failed:
            text += f"No capacity was left at {', '.join(failed)}. "
        return text + "These are test figures, to be read as a front and not to choose by; the default is energy 0.99."
