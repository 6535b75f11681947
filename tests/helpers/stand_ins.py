"""Tiny models and data in the place of those that the pages name: models for a Hub, data sets as folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage
from transformers import ViTImageProcessorPil

from helpers.models import fit, make_vit
from helpers.tofu import write_tofu
from unsc_hf.comparison.references.texts import LanguagePlan, TextPlan
from unsc_hf.comparison.references.training import train_model
from unsc_hf.data.dialogues import to_dialogues

BEANS = ["angular_leaf_spot", "bean_rust", "healthy"]
CLOTHES = [
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
EMOTIONS = ["sadness", "joy", "love", "anger", "fear", "surprise"]
OPINIONS = ["bad", "good"]


def images(names: Sequence[str], rows: int, seed: int, mode: str, column: str) -> Dataset:
    """Images of 8 x 8 pixels whose classes differ in their mean; `rows` of each."""
    shape, rng = (8, 8) if mode == "L" else (8, 8, 3), np.random.default_rng(seed)
    means = np.random.default_rng(7).integers(40, 216, (len(names), *shape))
    labels = [i % len(names) for i in range(rows * len(names))]
    pixels = [np.clip(means[c] + rng.normal(0, 20, shape), 0, 255).astype(np.uint8) for c in labels]
    features = Features({"image": Image(), column: ClassLabel(names=list(names))})
    pictures = [PILImage.fromarray(pixel, mode) for pixel in pixels]
    return Dataset.from_dict({"image": pictures, column: labels}, features=features)


def sentences(names: Sequence[str], rows: int, seed: int) -> Dataset:
    """Sentences of words that belong to their class; every tenth is by the author u42."""
    rng = np.random.default_rng(seed)
    lines = [
        {
            "text": " ".join(f"{names[label]}{number}" for number in rng.integers(0, 40, 6)),
            "label": label,
            "author": "u42" if i % 10 == 0 else f"u{i % 10}",
        }
        for label in range(len(names))
        for i in range(rows)
    ]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names)), "author": Value("string")})
    return Dataset.from_list(lines, features=features)


def image_model(folder: Path, train: Dataset, mode: str) -> None:
    """A ViT that knows the training images."""
    column = next(name for name in train.column_names if name != "image")
    names, channels = train.features[column].names, 1 if mode == "L" else 3
    pixels = np.stack([np.asarray(image).reshape(8, 8, channels) for image in train["image"]])
    model = make_vit(labels=len(names), num_channels=channels)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    values = torch.tensor(pixels / 127.5 - 1.0, dtype=torch.float32).permute(0, 3, 1, 2)
    fit(model, {"pixel_values": values, "labels": torch.tensor(train[column][:])}, steps=60).save_pretrained(folder)
    half = [0.5] * channels
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=size, image_mean=half, image_std=half, do_convert_rgb=None).save_pretrained(folder)


def text_model(folder: Path, train: Dataset) -> None:
    """A BERT that knows the training texts."""
    names = train.features["label"].names
    model, tokenizer = TextPlan(size="nano", vocabulary_size=400, max_length=32).start(train, names)
    inputs = tokenizer(train["text"][:], padding=True, return_tensors="pt")
    fit(model, {**inputs, "labels": torch.tensor(train["label"][:])}, steps=30)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def language_model(folder: Path, data: Path, names: Sequence[str]) -> None:
    """A Llama that has learned to end its answers to questions like TOFU's, those of some configurations."""
    parts = {name: Dataset.from_json(str(data / f"{name}.json")) for name in ("forget10", "retain90")}
    rows, learned = (to_dialogues(concatenate_datasets([parts[n] for n in given])) for given in (parts, names))
    plan = LanguagePlan(size="nano", vocabulary_size=300, max_length=128, epochs=60)
    train_model(learned, plan, folder.parent / "trained", "lm", vocabulary=rows).rename(folder)


def write_splits(folder: Path, **splits: Dataset) -> None:
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}.parquet")


def make_data(folder: Path) -> None:
    """Every data set of the pages, in a folder that has its name on the Hub."""
    beans, clothes = folder / "AI-Lab-Makerere" / "beans", folder / "zalando-datasets" / "fashion_mnist"
    parts = {"train": (40, 0), "validation": (16, 1), "test": (16, 2)}
    write_splits(beans, **{split: images(BEANS, *size, "RGB", "labels") for split, size in parts.items()})
    shown = {
        split: images(CLOTHES, rows, seed, "L", "label") for split, rows, seed in (("train", 20, 0), ("test", 8, 1))
    }
    write_splits(clothes, **shown)
    without = {split: rows.filter(lambda row: row["label"] != CLOTHES.index("Shirt")) for split, rows in shown.items()}
    without["test"] = shown["test"]
    write_splits(folder / "user" / "fashion-mnist-without-shirt", **without)
    for name, classes in (("dair-ai/emotion", EMOTIONS), ("user/reviews", OPINIONS)):
        write_splits(folder / name, **{split: sentences(classes, *size) for split, size in parts.items()})
    write_tofu(folder / "locuslab" / "TOFU")


def make_models(data: Path, folder: Path) -> dict[str, Path]:
    """Every model of the pages by its name on the Hub, in a folder."""
    beans = Dataset.from_parquet(str(data / "AI-Lab-Makerere" / "beans" / "train.parquet"))
    clothes = Dataset.from_parquet(str(data / "zalando-datasets" / "fashion_mnist" / "train.parquet"))
    emotions = Dataset.from_parquet(str(data / "dair-ai" / "emotion" / "train.parquet"))
    reviews = Dataset.from_parquet(str(data / "user" / "reviews" / "train.parquet"))
    made: dict[str, Path] = {}

    def place(name: str) -> Path:
        made[name] = folder / name.replace("/", "--")
        return made[name]

    for name in ("nateraw/vit-base-beans", "user/unlearned"):
        image_model(place(name), beans, "RGB")
    image_model(place("user/vit-fashion-mnist"), clothes, "L")
    others = clothes.filter(lambda row: row["label"] != CLOTHES.index("Shirt"))
    for i in range(3):
        image_model(place(f"user/vit-without-shirt-{i}"), others, "L")
    text_model(place("bhadresh-savani/distilbert-base-uncased-emotion"), emotions)
    text_model(place("user/bert-reviews"), reviews)
    llama, tofu = "open-unlearning/tofu_Llama-3.2-1B-Instruct", data / "locuslab" / "TOFU"
    language_model(place(f"{llama}_full"), tofu, ["forget10", "retain90"])
    language_model(place(f"{llama}_retain90"), tofu, ["retain90"])
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a model as a Hub holds them."""
    contents: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return contents
