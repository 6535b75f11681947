"""Draw the layers of the package: the picture on `docs/architecture.md`.

    python docs/draw_layers.py

The order comes from `pyproject.toml`, where `make lint` checks it.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import tomllib

HERE = Path(__file__).parent
# Name of a group, colour, and the layers in it with what each is for.
GROUPS = {
    "commands and jobs": (
        "#dbeafe",
        {
            "cli": "the command line",
            "app": "a page to try a run on",
            "runs": "whole jobs: model and data in, result out",
        },
    ),
    "research": ("#e0e7ff", {"comparison": "methods, controls and studies beside each other"}),
    "unlearning": (
        "#dcfce7",
        {
            "trainer": "UNSCTrainer: preparation, steps, checks, certificate",
            "reporting": "model card, report, pictures, the Hub",
            "tasks": "what a kind of model means",
            "config": "UNSCConfig: every option",
            "objectives": "losses and pseudo-labels",
        },
    ),
    "measuring": ("#fef9c3", {"evaluation": "accuracies, attacks, audits, the verdict"}),
    "mathematics": (
        "#fee2e2",
        {"nullspace": "moments, subspaces, projection", "models": "layers, hooks and outputs of a model"},
    ),
    "ground": (
        "#e5e7eb",
        {
            "data": "columns, rows and inputs",
            "utils": "files, hashes, processes, precision",
            "errors": "UNSCError: one line for the user",
        },
    ),
}
BAR, GAP, LEFT, WIDTH = 30, 4, 176, 520


def layers() -> list[str]:
    """The layers from top to bottom."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    order: list[str] = project["tool"]["importlinter"]["contracts"][0]["layers"]
    return order


def draw(order: list[str]) -> str:
    """The picture as SVG."""
    where = {name: (group, colour, text) for group, (colour, all_) in GROUPS.items() for name, text in all_.items()}
    height = 20 + len(order) * (BAR + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" '
        'font-family="system-ui, sans-serif" font-size="14">',
        "<title>Layers of unsc_hf: each imports only from the layers below it</title>",
        f'<rect width="100%" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#6b7280"/></marker></defs>',
        f'<line x1="16" y1="14" x2="16" y2="{height - 20}" stroke="#6b7280" stroke-width="2" marker-end="url(#tip)"/>',
        f'<text x="0" y="0" fill="#6b7280" transform="translate(34 {height // 2 + 50}) rotate(-90)">imports</text>',
    ]
    previous = ""
    for number, name in enumerate(order):
        group, colour, text = where[name]
        top = 10 + number * (BAR + GAP)
        if group != previous:
            lines.append(f'<text x="{LEFT - 10}" y="{top + 20}" text-anchor="end" fill="#4b5563">{group}</text>')
        lines += [
            f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{BAR}" rx="4" fill="{colour}" stroke="#9ca3af"/>',
            f'<text x="{LEFT + 12}" y="{top + 20}" font-weight="bold" fill="#111827">{name}</text>',
            f'<text x="{LEFT + 130}" y="{top + 20}" fill="#374151">{escape(text)}</text>',
        ]
        previous = group
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (HERE / "layers.svg").write_text(draw(layers()), encoding="utf-8")
