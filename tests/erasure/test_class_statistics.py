"""Class statistics: moments as they should be, additive, and refused where they are damaged or of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsc_hf import UNSCError
from unsc_hf.erasure.class_statistics import ClassStatistics, feature_targets, remove_stale
from unsc_hf.models.outputs import Outputs
from unsc_hf.utils.fingerprint import Fingerprint, file_hash


def _statistics(
    rows: int = 60, width: int = 5, weights: str = "w"
) -> tuple[ClassStatistics, torch.Tensor, torch.Tensor]:
    features, labels = 2 * torch.randn(rows, width) + 1, torch.arange(rows) % 3
    parts = [Outputs(features[i::2], features[i::2], labels[i::2]) for i in range(2)]
    return ClassStatistics.of(parts, Fingerprint(weights, "data")), features, labels


def test_moments_are_those_of_the_rows_whatever_the_batches() -> None:
    found, features, labels = _statistics()
    within = torch.zeros(5, 5, dtype=torch.float64)
    for label, moment in found.classes.items():
        rows = features[labels == label].double()
        assert moment.rows == len(rows)
        assert torch.allclose(moment.mean, rows.mean(0))
        assert torch.allclose(moment.covariance, torch.cov(rows.T, correction=0))
        within += torch.cov(rows.T, correction=0) / 3
    assert torch.allclose(found.within(), within)


def test_whitened_rows_have_mean_nought_and_variance_one() -> None:
    found, features, labels = _statistics(3000)
    targets = feature_targets(found)
    rows = (features[labels == 1] - targets.means[1]) @ targets.whitening[1]
    assert torch.allclose(rows.mean(0), torch.zeros(5), atol=1e-3)
    assert torch.allclose(torch.cov(rows.T), torch.eye(5), atol=0.05)
    assert torch.allclose(targets.precision.double() @ found.within(), torch.eye(5).double(), atol=0.1)


def test_round_trip_and_forgotten_classes_leave(tmp_path: Path) -> None:
    found, _, _ = _statistics()
    found.save_pretrained(tmp_path)
    again = ClassStatistics.from_pretrained(tmp_path)
    assert again.fingerprint == found.fingerprint
    for label, moment in found.classes.items():
        assert torch.equal(again.classes[label].square, moment.square)
    left = again.without([1], ["digest"])
    left.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert set(load_file(next(tmp_path.glob("*.safetensors")))) == {"0.total", "0.square", "2.total", "2.square"}
    assert ClassStatistics.from_pretrained(tmp_path).fingerprint.removed == ("digest",)
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pkl")]
    with pytest.raises(UNSCError, match="exclude: all 2 classes are excluded"):
        left.without([0, 2])
    with pytest.raises(UNSCError, match="class_statistics: collected from weights w .*but the model's are other"):
        left.check_same_model("other")
    remove_stale(tmp_path, "w")
    assert (tmp_path / "class_statistics.json").exists()
    remove_stale(tmp_path, "other")
    assert not list(tmp_path.iterdir())


def test_bad_input(caplog: pytest.LogCaptureFixture) -> None:
    found, _, _ = _statistics(rows=9)
    feature_targets(found)
    assert (
        "3 of 3 classes have no more rows than the 5 features (class 0 has 3): their covariances rest on the ridge"
        in caplog.text
    )
    with pytest.raises(UNSCError, match="retain_dataset: holds a single class"):
        feature_targets(found.without([0, 1]))
    bad = torch.full((2, 3), torch.nan)
    with pytest.raises(UNSCError, match="NaN or infinite features"):
        ClassStatistics.of([Outputs(bad, bad, torch.zeros(2, dtype=torch.long))])


DAMAGES: dict[str, Any] = {
    "no json": lambda meta: None,
    "not a dict": lambda meta: [1],
    "other format": lambda meta: {**meta, "format": "x"},
    "path outside": lambda meta: {**meta, "file": "../../etc/passwd"},
    "width": lambda meta: {**meta, "width": 7},
    "negative width": lambda meta: {**meta, "width": -1},
    "rows of text": lambda meta: {**meta, "rows": {"0": "many"}},
    "odd label": lambda meta: {**meta, "rows": {"../0": 3}},
    "missing label": lambda meta: {**meta, "rows": {**meta["rows"], "7": 3}},
    "bool rows": lambda meta: {**meta, "rows": {"0": True}},
    "odd fingerprint": lambda meta: {**meta, "fingerprint": {**meta["fingerprint"], "evil": 1}},
    "fingerprint type": lambda meta: {**meta, "fingerprint": {**meta["fingerprint"], "weights": 3}},
    "hash": lambda meta: {**meta, "sha256": "0" * 64},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_hostile_files_give_one_error(damage: str, tmp_path: Path) -> None:
    found, _, _ = _statistics()
    found.save_pretrained(tmp_path)
    file = tmp_path / "class_statistics.json"
    meta = DAMAGES[damage](json.loads(file.read_text(encoding="utf-8")))
    if meta is None:
        file.write_text("{", encoding="utf-8")
    else:
        file.write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UNSCError, match="class_statistics: "):
        ClassStatistics.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_that_are_not_finite(value: float, tmp_path: Path) -> None:
    found, _, _ = _statistics()
    found.save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["0.total"][0] = value
    save_file(tensors, weights)
    file = tmp_path / "class_statistics.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**meta, "sha256": file_hash(weights)}), encoding="utf-8")
    with pytest.raises(UNSCError, match="is damaged"):
        ClassStatistics.from_pretrained(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match="holds no class_statistics.json"):
        ClassStatistics.from_pretrained(tmp_path)
