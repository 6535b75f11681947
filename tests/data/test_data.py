"""Splits are partitions; mistakes get one line that names the argument and what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers.models import make_vit
from helpers.rows import tensor_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from unsc_hf import UNSCError, split_dataset
from unsc_hf.data.columns import read_labels
from unsc_hf.data.inputs import prepare_dataset
from unsc_hf.data.selection import hold_out
from unsc_hf.trainer.rows import RelabelledDataset


def _rows(labels: list[int], names: list[str] | None = None) -> Dataset:
    feature = ClassLabel(names=names) if names else Value("int64")
    features = Features({"x": Value("int64"), "label": feature})
    return Dataset.from_dict({"x": list(range(len(labels))), "label": labels}, features=features)


def test_classes_by_name_by_id_and_by_id_as_text() -> None:
    dataset = _rows([0, 1, 2, 1], ["cat", "7", "frog"])
    assert split_dataset(dataset, forget_classes=["cat"]).forget["x"][:] == [0]
    assert split_dataset(dataset, forget_classes="frog").forget["x"][:] == [2]
    assert split_dataset(dataset, forget_classes=[1, "cat"]).forget["x"][:] == [0, 1, 3]
    assert split_dataset(dataset, forget_classes=["7"]).forget["x"][:] == [1, 3]  # a name wins over an id
    assert split_dataset(dataset, forget_classes=["2"]).forget["x"][:] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_classes": ["frgo"]}, r"no class 'frgo'; closest: 'frog'"),
        ({"forget_classes": [9]}, "id 9 is out of range.*0 to 3"),
        ({"forget_classes": ["unseen"]}, r"class 'unseen' \(3\) has no rows"),
        ({"forget_classes": []}, "empty; name at least one"),
        ({"forget_classes": ["cat", "dog", "frog"]}, "all 3 classes"),
        ({"indices": [0, 99]}, "99 is out of range.*0 to 4"),
        ({"indices": [-1]}, "-1 is out of range"),
        ({"indices": [1, 1]}, "row 1 is given more than once"),
        ({"indices": []}, "nothing to forget"),
        ({"where": lambda row: True}, "nothing left to retain"),
        ({"forget_classes": ["cat"], "indices": [0]}, "exactly one"),
        ({}, "exactly one"),
        ({"forget_classes": ["cat"], "label_column": "klass"}, "no column 'klass'.*x, label"),
    ],
)
def test_bad_selections(options: dict[str, object], message: str) -> None:
    dataset = _rows([0, 1, 2, 1, 0], ["cat", "dog", "frog", "unseen"])
    with pytest.raises(UNSCError, match=message):
        split_dataset(dataset, **options)  # type: ignore[arg-type]


def test_bad_data_sets() -> None:
    for rows, message in (
        ([1, 2], "expected a datasets.Dataset"),
        (Dataset.from_dict({"a": [1, 2]}), "looks like labels"),
        (Dataset.from_dict({"label": ["a", "b"]}), "class_encode_column"),
    ):
        with pytest.raises(UNSCError, match=message):
            split_dataset(rows, forget_classes=["a"])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0.05, 0.5), st.integers(1, 50), st.integers(0, 5)
)
def test_hold_out_is_stratified_and_disjoint(labels: list[int], fraction: float, limit: int, seed: int) -> None:
    dataset = _rows(labels)
    rest, held = hold_out(dataset, fraction, np.asarray(labels), limit, seed)
    assert len(held) >= 1
    assert len(rest) >= 1
    if len(labels) > 1 and max(np.bincount(labels)) > 1:
        assert not set(rest["x"][:]) & set(held["x"][:])
        assert len(rest) + len(held) == len(labels)
        assert set(read_labels(rest)) == set(labels)  # no class vanishes from the rest


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("L", 3)])
def test_raw_images_become_model_inputs(mode: str, channels: int) -> None:
    arrays = [np.random.default_rng(i).integers(0, 255, (8, 8, 4), dtype=np.uint8) for i in range(3)]
    images = [PILImage.fromarray(a, "RGBA").convert(mode) for a in arrays]
    dataset = Dataset.from_dict({"image": images, "label": [0, 1, 2]}).cast_column("image", Image())
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.5] * channels, image_std=[0.5] * channels)
    model = make_vit(num_channels=channels)
    prepared = prepare_dataset(dataset, processor, model)
    assert torch.stack(list(prepared[:]["pixel_values"])).shape == (3, channels, 8, 8)
    assert prepared[:]["labels"] == [0, 1, 2]
    assert prepare_dataset(prepared, processor, model) is prepared
    with pytest.raises(UNSCError, match="processing_class"):
        prepare_dataset(dataset, None, model)


def test_relabelled_rows_keep_their_order() -> None:
    base = tensor_dataset(torch.randn(5, 3, 2, 2), [0, 1, 2, 0, 1])
    relabelled = RelabelledDataset(base, [{"pseudo_labels": torch.tensor(i)} for i in (9, 8, 7, 6, 5)])
    assert len(relabelled) == 5
    assert int(relabelled[3]["pseudo_labels"]) == 6
    assert [int(row["pseudo_labels"]) for row in relabelled.__getitems__([4, 0])] == [5, 9]
    assert torch.equal(relabelled.__getitems__([4])[0]["pixel_values"], base[4]["pixel_values"])


def test_retained_rows_are_drawn_anew_for_each_epoch_and_the_same_again() -> None:
    base = tensor_dataset(torch.randn(20, 3, 2, 2), [0] * 20)
    retained = tensor_dataset(torch.randn(50, 3, 2, 2), [1] * 50)
    targets = [{"pseudo_labels": torch.tensor(1)}] * 20

    def drawn(rows: RelabelledDataset) -> torch.Tensor:
        return torch.stack([row["retain"]["pixel_values"] for row in rows.__getitems__(list(range(20)))])

    first, again, other = (RelabelledDataset(base, targets, retained, seed) for seed in (3, 3, 4))
    epoch = drawn(first)
    assert torch.equal(epoch, drawn(first))  # however often, and whoever else draws numbers
    assert torch.equal(epoch, drawn(again))
    assert not torch.equal(epoch, drawn(other))
    first.begin_epoch(1)
    assert not torch.equal(epoch, drawn(first))
    first.begin_epoch(0)
    assert torch.equal(epoch, drawn(first))
