"""How many directions to keep: rules, and what they leave of both accuracies."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ...reporting.plots import BLUE, GREEN, ORANGE
from .lab import Lab, different, matching, mean, panels, spread, zoom
from .registry import Points, Study, register

_ENERGIES = (0.9, 0.95, 0.97, 0.99, 0.995, 0.999, 0.9999)
_SHARES = (0.125, 0.25, 0.5, 0.75)
_RATIOS = (0.5, 1.0, 1.5, 3.0)
_COLOURS = {"energy": BLUE, "rank": ORANGE, "ratio": GREEN}


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Rules: `energy`, `rank` as shares of the narrowest layer, `ratio` of forgotten against retained energy."""
    points = []
    for seed in lab.seeds:
        width = min(layer.geometry.width for layer in lab.experiment.bench(seed).plan.selection.layers)
        tried: list[tuple[str, float, dict[str, Any]]] = [
            *(("energy", e, {"subspace_rule": "energy", "energy": e}) for e in _ENERGIES),
            *(("rank", s, {"subspace_rule": "rank", "subspace_rank": max(1, round(s * width))}) for s in _SHARES),
            *(("ratio", r, {"subspace_rule": "ratio", "subspace_ratio": r}) for r in _RATIOS),
        ]
        points += [lab.run({"rule": rule, "setting": setting}, seed, options) for rule, setting, options in tried]
    return points


def plot(points: Points) -> Figure:
    figure, axes = panels(2, 5.2)
    for one, key in zip(axes, ("AccDrt", "AccDut"), strict=True):
        heights: list[float] = []
        for i, (rule, colour) in enumerate(_COLOURS.items()):
            settings = different(matching(points, rule=rule), "setting")
            rows = [matching(points, rule=rule, setting=s) for s in settings]
            x, y = ([100 * mean(row, k) for row in rows] for k in ("leak", key))
            bars = [100 * spread(row, key) for row in rows]
            one.errorbar(x, y, yerr=bars, fmt="o", ms=5, elinewidth=0.6, label=rule, color=colour)
            for a, b, setting in zip(x, y, settings, strict=True):
                one.annotate(
                    f"{setting:g}", (a, b), xytext=(3, 4 + 9 * i), textcoords="offset points", fontsize=7, color=colour
                )
            heights += y
        zoom(one, heights)
        one.set(xlabel="held-out leak (%)", ylabel=f"{key} (%)")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def paragraph(points: Points) -> str:
    best: dict[str, tuple[float, float]] = {}
    for rule in _COLOURS:
        for setting in different(matching(points, rule=rule), "setting"):
            runs = matching(points, rule=rule, setting=setting)
            if mean(runs, "AccDut") <= 0.01:
                kept = 100 * mean(runs, "AccDrt")
                if rule not in best or kept > best[rule][0]:
                    best[rule] = (kept, setting)
    best_settings = "; ".join(f"{rule} {setting:g} keeps {kept:.1f} %" for rule, (kept, setting) in best.items())
    failed = [f"{p['rule']} {p['setting']:g}" for p in points if "error" in p]
    stalled = sorted({f"{p['rule']} {p['setting']:g}" for p in matching(points) if (p.get("AccDut") or 0) > 0.01})
    text = (
        f"Of the settings that forget (AccDut at most 1 %), the best of each rule on the test rows: {best_settings}. "
    )
    if stalled:
        text += f"At least one seed did not forget within its budgets at {', '.join(stalled)}. "
    if failed:
        text += f"No capacity was left at {', '.join(sorted(set(failed)))}. "
    return text + "These are test figures, to be read as a front and not to choose by; the default is energy 0.99."


register(
    Study(
        "rank",
        "How many directions must be kept?",
        measure,
        {"rule": "rule", "setting": "setting"},
        {"AccDut": "AccDut", "AccDrt": "AccDrt", "leak": "leak", "steps": "steps"},
        plot,
        paragraph,
    )
)
