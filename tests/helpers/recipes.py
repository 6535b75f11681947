"""What runs of a recipe are tested with."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "unlearn_vit.py"
NAMES = ["cat", "dog", "frog", "owl"]
FAST = [
    "--use_cpu", "--disable_tqdm", "true", "--train_epochs", "12", "--model_size", "nano", "--patch_size", "4",
    "--max_steps", "20",
]  # fmt: skip


def run_recipe(recipe: Path, *arguments: Any) -> int:
    """Exit code of a recipe that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(recipe), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(recipe), run_name="__main__")
    return left.value.code


def run_process(*words: Any, **options: Any) -> str:
    """What a process of its own has written; it must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=280, env=environment, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def image_folder(rows: int, seed: int) -> Dataset:
    """Four classes of 8 x 8 colour images that differ in their mean."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(7).integers(60, 196, (4, 8, 8, 3))
    labels = [i % 4 for i in range(rows)]
    pixels = [np.clip(means[c] + rng.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8) for c in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": [PILImage.fromarray(p) for p in pixels], "label": labels}, features=features)


def parquet_folder(folder: Path, train: int = 240, test: int = 80) -> Path:
    """A data set of images in files."""
    folder.mkdir()
    image_folder(train, 0).to_parquet(folder / "train.parquet")
    image_folder(test, 1).to_parquet(folder / "test.parquet")
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    """What a finished run has written; NaN and infinity are no JSON."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
