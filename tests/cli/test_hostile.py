"""Data sets and models as nobody would want them: one clear line and nothing left behind, or a result."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from helpers.models import learned
from helpers.rows import tensor_dataset
from PIL import Image as PILImage
from safetensors.torch import load, save
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer, ViTImageProcessorPil

from unsc_hf import UNSCError
from unsc_hf.cli.main import main
from unsc_hf.data.inputs import TextTransform, unreadable_rows
from unsc_hf.models.loading import load_model

NAMES = ("cat", "dog", "frog")
LABELS = [c for c in range(3) for _ in range(20)]
Stored = Sequence[dict[str, Any] | None]


def png(pixels: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def images() -> list[dict[str, Any]]:
    rng = np.random.default_rng()
    means = rng.integers(60, 196, (3, 8, 8, 3))
    return [png(np.clip(means[c] + rng.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8)) for c in LABELS]


@pytest.fixture(scope="module")
def original(images: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    pixels = np.stack([np.asarray(Image().decode_example(image)) for image in images])
    inputs = torch.tensor(pixels / 127.5 - 1.0, dtype=torch.float32).permute(0, 3, 1, 2)
    learned(tensor_dataset(inputs, LABELS, list(NAMES))).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def store(folder: Path, split: str, images: Stored, labels: Sequence[int | None], names: Sequence[str] = NAMES) -> None:
    """A parquet file as anybody may have written it."""
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=list(names))})
    rows = Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features)
    folder.mkdir(exist_ok=True)
    rows.cast_column("image", Image()).to_parquet(folder / f"{split}.parquet")


def unlearn(original: Path, data: Path, output: Path) -> int:
    return main(
        ["unlearn", "image", "--model_name_or_path", str(original), "--dataset_name", str(data), "--forget_classes",
         "frog", "--no_controls", "--use_cpu", "--disable_tqdm", "true", "--max_steps", "4",
         "--output_dir", str(output)]
    )  # fmt: skip


def refused(original: Path, data: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said."""
    assert unlearn(original, data, output) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert len(lines) == 1
    assert not output.exists()
    return lines[0]


def changed(values: Sequence[Any], row: int, value: Any) -> list[Any]:
    return [value if i == row else old for i, old in enumerate(values)]


@pytest.mark.parametrize(
    "broken",
    [
        lambda good: {"bytes": b"not an image", "path": None},
        lambda good: {"bytes": good["bytes"][:60], "path": None},
        lambda good: None,
    ],
    ids=["no image", "truncated", "missing"],
)  # fmt: skip
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_without_a_readable_image_are_named(
    split: str, broken: Callable[[dict[str, Any]], Any], images: list[dict[str, Any]], original: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for part, step in (("train", 1), ("test", 3)):
        stored: list[Any] = list(images[::step])
        if part == split:
            stored[17] = broken(stored[17])
        store(tmp_path / "data", part, stored, LABELS[::step])
    said = refused(original, tmp_path / "data", tmp_path / "out", capsys)
    rows = 60 if split == "train" else 20
    assert f"1 of {rows} {split} rows hold no image or text that can be read: 17;" in said


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (changed(LABELS, 7, None), NAMES, "label_column: column 'label' holds None"),
        ([c + 2 for c in LABELS], ("a", "b", "c", "d", "frog"), "model: has 3 labels, but the data set holds label 4"),
        ([2] * 60, NAMES, "forget_classes: all 1 classes of the data would be forgotten"),
        ([0] * 60, NAMES, "forget_classes: class 'frog' (2) has no rows in the data"),
    ],
)
def test_labels_that_cannot_be(
    labels: list[Any], names: Sequence[str], message: str, images: list[dict[str, Any]], original: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store(tmp_path / "data", "train", images, labels, names)
    store(tmp_path / "data", "test", images[::3], [0 if c is None else c for c in labels[::3]], names)
    assert message in refused(original, tmp_path / "data", tmp_path / "out", capsys)


@pytest.mark.parametrize("damage", ["renamed column", "no labels", "garbage", "truncated", "empty"])
def test_files_that_cannot_be_read(
    damage: str, images: list[dict[str, Any]], original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    store(data, "train", images, LABELS)
    store(data, "test", images[::3], LABELS[::3])
    file = data / "test.parquet"
    whole = file.read_bytes()
    if damage == "renamed column":
        pq.write_table(pq.read_table(file).rename_columns(["picture", "label"]), file)
    elif damage == "no labels":
        pq.write_table(pq.read_table(file).drop_columns(["label"]), file)
    else:
        file.write_bytes({"garbage": b"PAR1 garbage", "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    said = refused(original, data, tmp_path / "out", capsys)
    assert said.startswith("error: dataset_name: cannot load")
    assert len(said) > len(f"error: dataset_name: cannot load '{data}': ") + 10
    if damage in ("renamed column", "no labels"):
        assert "the columns of its files differ" in said


@pytest.mark.parametrize("case", ["one row of each", "all the same", "other sizes"])
def test_odd_data_is_served(case: str, images: list[dict[str, Any]], original: Path, tmp_path: Path) -> None:
    stored: list[Any] = list(images)
    labels = list(LABELS)
    if case == "one row of each":
        stored, labels = [images[0], images[25], images[45]], [0, 1, 2]
    elif case == "all the same":
        stored = [images[0]] * 60
    else:
        stored = [png(np.zeros((1 + i % 9, 1 + i % 4, 3), np.uint8)) for i in range(60)]
    store(tmp_path / "data", "train", stored, labels)
    store(tmp_path / "data", "test", images[::3], LABELS[::3])
    assert unlearn(original, tmp_path / "data", tmp_path / "out") in (0, 2)  # a budget may be too small for such data
    assert (tmp_path / "out").exists() == (tmp_path / "out" / "results.json").exists()


def test_missing_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rows = Dataset.from_dict({"text": ["a b", None, "", "b"], "label": [0, 1, 0, 1]})
    assert unreadable_rows(rows) == [1]
    with pytest.raises(UNSCError, match="a row holds no text"):
        TextTransform(tokenizer, ("text",), "label")(rows[:])


@pytest.mark.parametrize("damage", ["truncated", "swapped", "huge header", "no file", "one missing"])
def test_damaged_weights_are_one_line(damage: str, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[: len(whole) // 2])
    elif damage == "huge header":
        weights.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    elif damage == "no file":
        weights.unlink()
    elif damage == "one missing":  # transformers would draw it at random, with a warning
        tensors = load(whole)
        del tensors["classifier.weight"]
        weights.write_bytes(save(tensors, {"format": "pt"}))
    else:
        small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        BertForSequenceClassification(small).save_pretrained(tmp_path / "bert")
        weights.write_bytes((tmp_path / "bert" / "model.safetensors").read_bytes())
    with pytest.raises(UNSCError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
