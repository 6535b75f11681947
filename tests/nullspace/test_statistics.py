"""Moments are exact sums: independent of batching, additive, and tied to the model they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, concatenate_datasets
from helpers.failpoints import Killed, stopped_at
from helpers.models import make_vit
from helpers.rows import random_rows
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from unsc_hf import UNSCConfig
from unsc_hf.data.selection import split_dataset
from unsc_hf.errors import UNSCError
from unsc_hf.models.hooks import capture_inputs
from unsc_hf.models.layers import find_layers
from unsc_hf.nullspace import collect
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.statistics import ActivationStatistics
from unsc_hf.utils.fingerprint import data_fingerprint, weight_hash


def _collect(model: Any, data: Dataset, **options: Any) -> ActivationStatistics:
    return ActivationStatistics.collect(model, data, progress=False, **options)


def _assert_same(a: ActivationStatistics, b: ActivationStatistics, tolerance: float = 1e-10) -> None:
    assert a.moments.keys() == b.moments.keys()
    for group in a.moments:
        for key in a.keys:
            one, two = a.moments[group][key], b.moments[group][key]
            assert one.rows == two.rows
            assert (one.matrix - two.matrix).norm() <= tolerance * one.matrix.norm()


def test_moments_equal_the_explicit_product_of_inputs() -> None:
    model, data = make_vit().double(), random_rows(24)
    statistics = _collect(model, data)
    layers = find_layers(model).layers
    inputs: dict[str, list[torch.Tensor]] = {}
    with (
        torch.no_grad(),
        capture_inputs(layers, lambda layer, x: inputs.setdefault(layer.name, []).append(layer.rows(x)[0])),
    ):
        model(data[:]["pixel_values"].double())
    pooled = statistics.pooled()
    for layer in layers:
        x = torch.cat(inputs[layer.name])
        moment = pooled[statistics.module_keys[layer.name]]
        assert moment.rows == len(x)
        torch.testing.assert_close(moment.matrix[0], x.T @ x, rtol=1e-6, atol=1e-6)


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of rows binds however few samples there are."""
    monkeypatch.setattr(collect, "_LEAST_SAMPLES", 1)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.usefixtures("few_samples")
def test_batch_size_does_not_matter(budget: int | None) -> None:
    model, data = make_vit().double(), random_rows(24)
    data = data.with_format("torch", dtype=torch.float64)
    one, seven, every = (_collect(model, data, batch_size=n, rows_per_direction=budget) for n in (1, 7, 24))
    _assert_same(one, seven)
    _assert_same(one, every)


def test_subtracting_a_class_equals_collecting_without_it() -> None:
    model, data = make_vit().double(), random_rows(24)
    data = data.with_format("torch", dtype=torch.float64)
    everything = _collect(model, data)
    forget, retain = split_dataset(data, forget_classes=[1])
    without = _collect(model, retain)
    class_one = _collect(model, forget)
    _assert_same(everything - class_one, without)
    _assert_same(without + class_one, everything)
    pooled, expected = everything.pooled(everything.groups(exclude=["class 1"])), without.pooled()
    for key in pooled:
        assert (pooled[key].matrix - expected[key].matrix).norm() <= 1e-10 * expected[key].matrix.norm()


@pytest.mark.usefixtures("few_samples")
def test_rows_of_one_class_can_be_taken_out() -> None:
    model, data = make_vit().double(), random_rows(24)
    everything = _collect(model, data)
    some = _collect(model, data.select(range(5)))
    rest = _collect(model, data.select(range(5, 24)))
    _assert_same(everything - some, rest, 1e-8)
    with pytest.raises(UNSCError, match="more rows"):
        some - everything
    budgeted = _collect(model, data, rows_per_direction=1)
    with pytest.raises(UNSCError, match="rows_per_direction"):
        budgeted - some
    part = _collect(model, data.select(range(9)), rows_per_direction=1)
    with pytest.raises(UNSCError, match="take out whole classes"):
        budgeted - part


def test_pooling_classes_gives_their_sum() -> None:
    model, data = make_vit(), random_rows(24)
    pooled = _collect(model, data, pool_as="all")
    apart = _collect(model, data)
    assert list(pooled.moments) == ["all"]
    for key, moment in apart.pooled().items():
        torch.testing.assert_close(pooled.moments["all"][key].matrix, moment.matrix)


def test_mean_direction_is_seen() -> None:
    """A centred covariance would put the mean into the null space."""
    rows = torch.randn(1, 200, 6) * 0.01 + torch.tensor([5.0, 0, 0, 0, 0, 0])
    moment = SecondMoment.zeros(1, 6).update(rows)
    assert moment.matrix[0, 0, 0] > 4000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_add_up_to_the_product(groups: int, dtype: torch.dtype) -> None:
    """Wider than a block, and more rows than are multiplied at once."""
    rows = torch.randn(groups, 1300, 600)
    moment = SecondMoment.zeros(groups, 600).update(rows[:, :700], dtype).update(rows[:, 700:], dtype)
    exact = rows.double().mT @ rows.double()
    error = (moment.matrix - exact).abs().max() / exact.abs().max()
    assert error <= (1e-14 if dtype == torch.float64 else 1e-6)
    assert (moment.matrix - moment.matrix.mT).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-2)
    assert moment.matrix.dtype == torch.float64
    assert moment.rows == 1300


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_of_the_size_of_a_moment_is_made_on_the_way(dtype: torch.dtype) -> None:
    moment, rows = SecondMoment.zeros(1, 1536), torch.randn(1, 40, 1536)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        moment.update(rows, dtype)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < moment.matrix.nbytes / 3


def _passes(caplog: pytest.LogCaptureFixture) -> int:
    """How many passes over the data the last collecting took."""
    told = [record.message for record in caplog.records if record.message.startswith("Statistics of")]
    return int(told[-1].split(" layer inputs in ")[1].split()[0])


@pytest.mark.parametrize("pool_as", [None, "all"])
@pytest.mark.parametrize("budget", [None, 1])
def test_several_passes_give_the_bits_of_one(
    budget: int | None, pool_as: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "unsc_hf")
    in_files: list[int] = []
    mapped = collect.mapped
    monkeypatch.setattr(collect, "mapped", lambda tensor, folder: in_files.append(1) or mapped(tensor, folder))
    model, data = make_vit(layers=4), random_rows(24)
    options: dict[str, Any] = {"rows_per_direction": budget, "pool_as": pool_as}
    one = _collect(model, data, **options)
    assert not caplog.records
    for limit in ("5MB", "1.36MB", 1_260_000):
        grouped = _collect(model, data, max_memory=limit, **options)
        assert grouped.keys == one.keys
        assert bool(in_files) == (limit != "5MB")  # where the results do not fit beside the pass
        assert all(list(grouped.moments[group]) == list(by_key) for group, by_key in one.moments.items())
        _assert_same(grouped, one, 0.0)
    assert _passes(caplog) >= 4
    grouped.subspace(energy=0.9)  # moments in files are moments like others
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_ahead_changes_nothing(workers: int) -> None:
    model, data = make_vit(), random_rows(24)
    options: dict[str, Any] = {"batch_size": 3, "rows_per_direction": 1}
    state = torch.random.get_rng_state()
    alone = _collect(model, data, **options)
    ahead = _collect(model, data, num_workers=workers, max_memory="1.26MB", **options)
    _assert_same(ahead, alone, 0.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_modes_and_hooks_are_restored() -> None:
    model = make_vit()
    model.train()
    model.vit.layernorm.eval()
    _collect(model, random_rows(24))
    assert model.training
    assert not model.vit.layernorm.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_round_trip_and_refusals(tmp_path: Path) -> None:
    model, data = make_vit(), random_rows(24)
    statistics = _collect(model, data)
    statistics.save_pretrained(tmp_path / "stats")
    (tmp_path / "stats" / "notes.txt").write_text("mine")
    statistics.save_pretrained(tmp_path / "stats")  # again, over itself: what else lies there stays
    (tensors,) = (tmp_path / "stats").glob("statistics-*.safetensors")
    assert {p.name for p in (tmp_path / "stats").iterdir()} == {"statistics.json", tensors.name, "notes.txt"}
    loaded = ActivationStatistics.from_pretrained(tmp_path / "stats", model)
    assert loaded.fingerprint == statistics.fingerprint
    assert loaded.group_names == statistics.group_names
    _assert_same(loaded, statistics, 0.0)

    other = make_vit()
    with pytest.raises(UNSCError) as refusal:
        ActivationStatistics.from_pretrained(tmp_path / "stats", other)
    assert weight_hash(model)[:12] in str(refusal.value)
    assert weight_hash(other)[:12] in str(refusal.value)
    with pytest.raises(UNSCError, match="weights"):
        statistics + _collect(other, data)
    fewer = _collect(model, data, target_modules=["fc1"])
    with pytest.raises(UNSCError, match="modules"):
        statistics + fewer


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "is damaged"),
        ("json", "is damaged"),
        ("shape", "is damaged .a moment has shape"),
        ("nan", "is damaged .a moment is not finite"),
        ("format", "has format 'other'"),
        ("missing", "holds no"),
        ("swap", "is damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "stats"
    _collect(make_vit(), random_rows(24)).save_pretrained(folder)
    (tensors,) = folder.glob("statistics-*.safetensors")
    meta = folder / "statistics.json"
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "json":
        meta.write_text("{", encoding="utf-8")
    elif damage == "missing":
        tensors.unlink()
    elif damage == "format":
        meta.write_text(json.dumps({"format": "other"}), encoding="utf-8")
    else:
        content = load_file(tensors)
        name = next(iter(content))
        if damage == "swap":
            content.pop(name)
        else:
            content[name] = content[name][:, :-1].contiguous() if damage == "shape" else content[name] * torch.nan
        save_file(content, tensors)
    with pytest.raises(UNSCError, match=f"statistics: .*{message}"):
        ActivationStatistics.from_pretrained(folder)


def test_bad_activations_name_the_layer() -> None:
    model = make_vit()
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(UNSCError, match=r"vit\.layers\.0\.mlp\.fc2"):
        _collect(model, random_rows(24))


def test_unknown_and_exhausted_exclusions() -> None:
    statistics = _collect(make_vit(), random_rows(24))
    with pytest.raises(UNSCError, match="'class 1'"):
        statistics.groups(exclude=["clas 1"])
    with pytest.raises(UNSCError, match="keep at least one"):
        statistics.groups(exclude=[0, 1, 2])


def test_data_fingerprint_depends_on_content_and_order_only() -> None:
    data = random_rows(24)
    again = concatenate_datasets([data.select(range(10)), data.select(range(10, 24))])
    assert data_fingerprint(data) == data_fingerprint(data.select(range(24)))
    assert data_fingerprint(data) == data_fingerprint(again)
    assert data_fingerprint(data) != data_fingerprint(data.select(range(23, -1, -1)))
    assert data_fingerprint(data) != data_fingerprint(data.select(range(23)))


def test_data_fingerprint_reads_images_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"

    def write(shade: int) -> None:
        PILImage.new("L", (4, 4), shade).save(path)

    write(10)
    beside = Dataset.from_dict({"image": [str(path)]}).cast_column("image", Image())
    inside = Dataset.from_dict({"image": [{"bytes": path.read_bytes(), "path": None}]}).cast_column("image", Image())
    first = data_fingerprint(beside)
    assert first == data_fingerprint(inside)
    write(11)
    assert data_fingerprint(beside) != first


def test_statistics_killed_while_saving_are_the_old_or_the_new(tmp_path: Path) -> None:
    statistics = _collect(make_vit(hidden=16, layers=1), random_rows(24))
    fewer = statistics.without_groups([statistics.groups()[0]])

    def replace(folder: Path, event: int) -> int:
        statistics.save_pretrained(folder)
        with stopped_at(event, folder) as failpoint:
            fewer.save_pretrained(folder)
        return failpoint.events

    events = replace(tmp_path / "whole", -1)
    assert events > 3
    for event in range(events):
        with pytest.raises(Killed):
            replace(tmp_path / str(event), event)
        found = ActivationStatistics.from_pretrained(tmp_path / str(event))
        assert found.groups() in (statistics.groups(), fewer.groups()), event
        fewer.save_pretrained(tmp_path / str(event))
        assert ActivationStatistics.from_pretrained(tmp_path / str(event)).groups() == fewer.groups()
    assert len(list((tmp_path / "whole").iterdir())) == 2


def test_float32_products_decide_alike_where_directions_are_large() -> None:
    model = make_vit()
    data = random_rows(60)
    exact, coarse = (
        _collect(model, data, dtype=dtype).subspace(energy=0.99) for dtype in (torch.float64, torch.float32)
    )
    for key, layer in exact.layers.items():
        other = coarse.layers[key]
        assert other.ranks == layer.ranks
        kept, also = (part.basis[0, :, : part.ranks[0]] for part in (layer, other))
        assert torch.linalg.matrix_norm(kept.mT @ also, 2) == pytest.approx(1, abs=1e-9)
        assert torch.linalg.svdvals(kept.mT @ also).min() >= 1 - 1e-5


def test_products_are_exact_where_the_smallest_directions_count(tmp_path: Path) -> None:
    def dtype(**options: Any) -> torch.dtype:
        return UNSCConfig(output_dir=str(tmp_path), **options).product_dtype

    assert dtype() == torch.float32
    assert dtype(energy=1.0) == dtype(subspace_rule="ratio", subspace_size=2.0) == torch.float64
    assert dtype(subspace_rule="class_energy") == torch.float64
