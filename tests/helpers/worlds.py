"""Data and a model of each kind in folders, as a command line names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import ViTImageProcessorPil

from helpers.language import questions
from helpers.models import fit, make_vit
from helpers.recipes import image_folder
from helpers.texts import NAMES, texts
from unsc_hf.cli.main import main
from unsc_hf.comparison.references.texts import LanguagePlan, TextPlan
from unsc_hf.data.dialogues import to_dialogues

FAST = ("--no_controls", "--use_cpu", "--disable_tqdm", "true", "--max_steps", "4")


@dataclass(frozen=True)
class World:
    """A model that was trained on some rows.

    Attributes:
        kind: "image", "text" or "lm", as `unsc unlearn` wants it.
        model: folder of the original.
        data: splits.
        request: options that say what to forget.
    """

    kind: str
    model: Path
    data: dict[str, Dataset]
    request: tuple[Any, ...]

    def unlearn(self, data: dict[str, Dataset], folder: Path, *options: Any) -> int:
        """Exit code of `unsc unlearn` on these splits; it works in `folder`, and writes into `folder / "out"`."""
        for split, rows in data.items():
            rows.to_parquet(folder / "data" / f"{split}.parquet")
        words = ["unlearn", self.kind, "--model_name_or_path", self.model, "--dataset_name", folder / "data"]
        words += [*self.request, *FAST, "--output_dir", folder / "out", *options]
        return main([str(word) for word in words])


def images(folder: Path, forget: str = "owl", relabel: Callable[[int], int] = int) -> World:
    """A tiny ViT that knows four classes of images; `relabel` changes what it is taught."""
    train, test = image_folder(80, 0), image_folder(40, 1)
    pixels = torch.tensor(np.stack([np.asarray(image) for image in train["image"]]) / 127.5 - 1.0, dtype=torch.float32)
    labels = torch.tensor([relabel(label) for label in train["label"]])
    model = fit(make_vit(labels=4), {"pixel_values": pixels.permute(0, 3, 1, 2), "labels": labels}, steps=60)
    for part in (model, ViTImageProcessorPil(size={"height": 8, "width": 8})):
        part.save_pretrained(folder)
    return World("image", folder, {"train": train, "test": test}, ("--forget_classes", forget))


def sentences(folder: Path) -> World:
    """A tiny BERT, untrained."""
    data = {"train": texts(20), "test": texts(8, seed=1), "validation": texts(8, seed=2)}
    data = {split: unlike(rows) for split, rows in data.items()}
    for part in TextPlan(size="nano", vocabulary_size=200, max_length=16).start(data["train"], NAMES):
        part.save_pretrained(folder)
    return World("text", folder, data, ("--forget_indices", 0, 5))


def answers(folder: Path) -> World:
    """A tiny Llama, untrained."""
    data = {"forget": questions(3), "retain": questions(7, start=3)}
    rows = to_dialogues(concatenate_datasets(list(data.values())))
    for part in LanguagePlan(size="nano", vocabulary_size=300, max_length=64).start(rows):
        part.save_pretrained(folder)
    return World("lm", folder, data, ("--target_forget_accuracy", 0))


def unlike(rows: Dataset) -> Dataset:
    """The rows without repeated texts."""
    first = {text: i for i, text in reversed(list(enumerate(rows["text"])))}
    return rows.select(sorted(first.values()))


def again(rows: Dataset, numbers: Sequence[int], **columns: Any) -> Dataset:
    """Some rows once more at the end, with other values in some columns."""
    extra = rows.select(numbers)
    extra = extra.map(lambda row: columns, load_from_cache_file=False).cast(rows.features) if columns else extra
    return concatenate_datasets([rows, extra])
