"""How many directions to keep: rules, and what they leave of both accuracies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .study import Lab, Panel, Point, Points, study

_ENERGIES = (0.9, 0.95, 0.97, 0.99, 0.995, 0.999, 0.9999)
_SHARES = (0.125, 0.25, 0.5, 0.75)
_RATIOS = (0.5, 1.0, 1.5, 3.0)


def _conclude(points: Points) -> str:
    best = []
    for rule, runs in points.by("rule").items():
        forgot = {setting: of for setting, of in runs.by("setting").items() if of.mean("AccDut") <= 0.01}
        if forgot:
            setting = max(forgot, key=lambda setting: forgot[setting].mean("AccDrt"))
            best.append(f"{rule} {setting:g} keeps {forgot[setting].percent('AccDrt')} %")
    others = {f"{p['rule']} {p['setting']:g}" for p in points if (p.get("AccDut") or 0) > 0.01 or "error" in p}
    return (
        "Of the settings that forget (AccDut at most 1 %), the best of each rule on the test rows, which choose "
        f"nothing: {', '.join(best) or 'none'}. At least one seed did not forget, or found no capacity left, at: "
        f"{', '.join(sorted(others)) or 'none'}."
    )


@study(
    "How many directions must be kept?",
    tags={"rule": "rule", "setting": "setting"},
    panels=[Panel(y, "setting", by="rule", at="leak") for y in ("AccDrt", "AccDut")],
    conclude=_conclude,
)
def rank(lab: Lab) -> Iterator[Point]:
    """Rules: `energy`, `rank` as shares of the narrowest layer, `ratio` of forgotten against retained energy."""
    for seed in lab.seeds:
        width = min(layer.geometry.width for layer in lab.experiment.bench(seed).plan.selection.layers)
        tried: list[tuple[str, float, dict[str, Any]]] = [
            *(("energy", energy, {"energy": energy}) for energy in _ENERGIES),
            *(("rank", share, {"subspace_size": max(1, round(share * width))}) for share in _SHARES),
            *(("ratio", ratio, {"subspace_size": ratio}) for ratio in _RATIOS),
        ]
        for rule, setting, options in tried:
            yield lab.run({"rule": rule, "setting": setting}, seed, subspace_rule=rule, **options)
