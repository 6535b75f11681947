"""Training of the paper's networks for the evidence."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("train_network")


def test_images_are_shifted_and_mirrored_whole(script: Any) -> None:
    """Each is a cut of the image with its border repeated, or of its mirror image."""
    images = torch.randn(64, 3, 8, 8)
    padded = torch.nn.functional.pad(images, (script.SHIFT,) * 4, mode="replicate")
    cuts = padded.unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3)  # (rows, channels, places, side, side)
    for mirror in (False, True):
        made = script.varied(images, mirror)[:, :, None]
        straight = (made == cuts).all((1, 3, 4)).any(1)
        mirrored = (made.flip(4) == cuts).all((1, 3, 4)).any(1)
        assert (straight | mirrored).all()
        assert (~straight).any() == mirror


def test_a_network_learns_without_a_class_and_is_kept(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "grey", "light"])})
    labels = torch.randint(0, 3, (90,)).tolist()
    pictures = [PILImage.new("L", (28, 28), 40 + 80 * label) for label in labels]
    for part in ("train", "test"):
        Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(
            tmp_path / f"{part}.parquet"
        )
    out = tmp_path / "model"
    words = ["--network", "alexnet", "--data", tmp_path, "--output_dir", out, "--epochs", 4, "--batch", 16,
             "--without", "grey"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_network.py", *map(str, words)])
    script.main()
    written = json.loads((out / "training.json").read_text())
    assert written["rows"] == 90 - labels.count(1)
    assert written["test_accuracy"] > 0.9
    before = (out / "model.safetensors").stat().st_mtime_ns
    script.main()
    assert (out / "model.safetensors").stat().st_mtime_ns == before
