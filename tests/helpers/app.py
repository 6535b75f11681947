"""A small finished run for the page, beside everything that belongs to it."""

from __future__ import annotations

from pathlib import Path

from helpers.recipes import FAST
from helpers.stand_ins import images, write_splits
from unsc_hf.cli.main import main

ANIMALS = ["cat", "dog", "owl"]


def finished_image_run(root: Path) -> Path:
    """A run that forgot owls, in `root/out`; its data and references lie beside it."""
    (root / "data").mkdir()
    parts = {"train": images(ANIMALS, 40, 0, "L", "label"), "test": images(ANIMALS, 15, 1, "L", "label")}
    write_splits(root / "data", **parts)
    words = ["unlearn", "image", "--dataset_name", root / "data", "--forget_classes", "owl", "--train_original"]
    words += ["--train_retrained", "--no_controls", "--references_dir", root / "references"]
    assert main([*map(str, words), "--output_dir", str(root / "out"), *FAST]) == 0
    return root / "out"
