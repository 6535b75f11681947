"""Unlearning under a memory limit: sketched layers keep the promise, in full weights and in adapters, and say what they are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.models import learned, make_vit
from helpers.rows import tensor_dataset
from helpers.training import Data, logits, make_trainer
from peft import LoraConfig

from unsc_hf import ActivationStatistics, UNSCConfig, UNSCError, serve_request, split_dataset
from unsc_hf.nullspace.moments import SecondMoment
from unsc_hf.nullspace.sketch import MomentSketch, RowSample

WIDE = "vit.layers.0.mlp.fc2"


# Holds the moments of inputs 48 wide, not of those 96 wide; float32 products would need more room on the way.
LIMIT: dict[str, Any] = {"max_statistics_memory": "1.22MB", "statistics_dtype": "float64"}


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "wide_layer.py"


@pytest.mark.parametrize("adapter", [False, True])
def test_retained_outputs_do_not_move(adapter: bool, exact_data: Data, tmp_path: Path) -> None:
    forget, retain = exact_data
    model = make_vit(labels=10)
    before, before_forget = logits(model, retain), logits(model, forget)
    options: dict[str, Any] = {"trainer_kwargs": {"peft_config": LoraConfig(r=4)}} if adapter else {}
    trainer = make_trainer(model, exact_data, tmp_path, check_steps=100, learning_rate=2e-4, **LIMIT, **options)
    trainer.prepare_unlearning()
    assert isinstance(trainer.retained_statistics.moments["retain"][WIDE], MomentSketch)
    assert isinstance(trainer._forget_moments[WIDE], MomentSketch)
    assert trainer.plan.subspace[WIDE].thin
    trainer.train()
    assert trainer.plan.subspace[WIDE].error_bound < 1e-9
    network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    drifts = [
        float((logits(network, part) - old).norm() / old.norm())
        for part, old in ((retain, before), (forget, before_forget))
    ]
    assert drifts[0] <= 1e-6
    assert drifts[1] > 1e-3
    moved = {
        layer.name: float(trainer.plan.projection.change(layer).norm()) for layer in trainer.plan.projection.layers
    }
    assert moved[WIDE] > 1e-4
    certificate = trainer.certify()
    assert certificate.leak < 1e-5
    assert certificate.sampled_rows[WIDE] > 0
    assert certificate.sampled_rows.keys() == {WIDE, "vit.layers.1.mlp.fc2"}
    report = {row.layer: row for row in trainer.plan.subspace.report()}
    assert report[WIDE].sketch_size is not None
    assert report["vit.layers.0.mlp.fc1"].sketch_size is None


def test_leak_and_accuracy_are_those_of_whole_moments(separable_data: Callable[[int], Dataset], tmp_path: Path) -> None:
    train = separable_data(30)
    data, model = split_dataset(train, forget_classes=[2]), learned(train)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    leaks = []
    for limit in ({}, LIMIT):
        model.load_state_dict(start)
        trainer = make_trainer(model, data, tmp_path / "out", energy=0.95, max_steps=5, learning_rate=1e-3, **limit)
        trainer.train()
        leaks.append(trainer.held_out_leak())
        if limit:  # the same displacement, measured by whole moments
            sampled = trainer.plan.held_out
            assert isinstance(sampled[WIDE], RowSample)
            every = {
                key: m if isinstance(m, SecondMoment) else SecondMoment.zeros(1, 96).update(m.filled[None])
                for key, m in sampled.items()
            }
            exact = trainer.plan.projection.leak(every, trainer.plan.subspace.module_keys)
            assert leaks[1].per_layer == pytest.approx(exact.per_layer, rel=1e-5)
    assert leaks[1].total == pytest.approx(leaks[0].total, rel=0.5)


def test_only_layers_with_capacity_are_trained_and_only_their_start_is_kept(tmp_path: Path) -> None:
    """Sixteen images have 80 tokens: they fill inputs 48 wide, not those 96 wide, nor the head's, which reads one token of each."""
    retain = tensor_dataset(torch.randn(16, 3, 8, 8), [0, 1] * 8, ["a", "b", "c"])
    forget = tensor_dataset(torch.randn(40, 3, 8, 8), [2] * 40, ["a", "b", "c"])
    model = make_vit()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, (forget, retain), tmp_path, validation_fraction=0.01)
    trainer.train()
    plan = trainer.plan
    free = {name for name in plan.subspace.module_keys if plan.subspace[name].has_capacity}
    assert {WIDE, "vit.layers.1.mlp.fc2", "classifier"} <= free
    assert len(free) < len(plan.subspace.module_keys) - 5
    assert set(plan.projection._start) == {layer.name for layer in plan.selection.layers} == free
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]) == (name.removesuffix(".weight") not in free), name


def test_readers_of_the_trainer_serve_the_statistics(
    low_rank_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    loader = torch.utils.data.DataLoader

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["num_workers"])
        return loader(*args, **kwargs)

    monkeypatch.setattr("unsc_hf.nullspace.collect.DataLoader", recording)
    model = make_vit()
    alone = make_trainer(model, low_rank_data, tmp_path)
    alone.prepare_unlearning()
    read = make_trainer(model, low_rank_data, tmp_path, dataloader_num_workers=1)
    read.prepare_unlearning()
    assert seen == [0, 0, 0, 1, 1, 1]
    for key, moment in alone.retained_statistics.moments["retain"].items():
        assert torch.equal(read.retained_statistics.moments["retain"][key].matrix, moment.matrix)


def test_requests_in_sequence_keep_to_the_limit(separable_data: Callable[[int], Dataset], tmp_path: Path) -> None:
    train = separable_data(20)
    model = learned(train)
    config = UNSCConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, report_to="none", energy=0.9, max_steps=3,
        max_leak=None, sketch_size=40, **LIMIT,
    )  # fmt: skip
    forget, retain = split_dataset(train, forget_classes=["cat"])
    serve_request(model, tmp_path / "statistics", config, forget, retain)
    stored = ActivationStatistics.from_pretrained(tmp_path / "statistics", model)
    assert stored.sketch_sizes == {WIDE: 40, "vit.layers.1.mlp.fc2": 40}
    config.max_statistics_memory = config.sketch_size = None  # stored sketches say themselves what they are
    again = serve_request(model, tmp_path / "statistics", config, *split_dataset(retain, forget_classes=["dog"]))
    assert again.plan.subspace[WIDE].sketch_size == 40
    assert isinstance(again.plan.held_out[WIDE], RowSample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_statistics_memory": "lots"}, "max_statistics_memory: 'lots' is not a size"),
        ({"sketch_size": 0, **LIMIT}, "sketch_size: 0 is not a positive number"),
        ({"sketch_size": 9}, "sketch_size: 9 given without max_statistics_memory"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match=message):
        UNSCConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_statistics_memory": "9KB"}, "max_statistics_memory: 9KB cannot hold"),
        ({**LIMIT, "subspace_rule": "ratio", "subspace_ratio": 1.5}, "subspace_rule: 'ratio' needs the whole moment"),
        ({**LIMIT, "subspace_merge": "concat"}, "subspace_merge: 'concat' needs the whole moment"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: dict[str, Any], message: str, low_rank_data: Data, tmp_path: Path
) -> None:
    with pytest.raises(UNSCError, match=message):
        make_trainer(make_vit(), low_rank_data, tmp_path, **options).train()


# ---- the benchmark --------------------------------------------------------------------------------------------------
def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wide_layer", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_printed_bound_is_the_true_error() -> None:
    bench = _benchmark()
    model, rows = bench.Block(64, 200), bench.Rows(4096, 64)
    whole, keys = bench.collect(model, rows, None, 8)
    sketched, also = bench.collect(model, rows, 2_700_000, 8)
    assert keys == also
    exact, sketch = whole["mlp.down_proj"].matrix[0], sketched["mlp.down_proj"]
    assert isinstance(sketch, MomentSketch)
    assert torch.equal(sketched["mlp.gate_proj"].matrix, whole["mlp.gate_proj"].matrix)
    values, vectors = sketch.eigen()
    missed = torch.linalg.eigvalsh(exact - vectors * values @ vectors.T)
    bound = float(sketch.trace - values.sum())
    assert 0 < bound < 0.5 * float(sketch.trace)
    assert bound == pytest.approx(float(missed.abs().sum()), rel=1e-6)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    file = tmp_path / "wide_layer.json"
    done = subprocess.run(
        [
            sys.executable, str(BENCHMARK), "--hidden", "64", "--intermediate", "200", "--rows", "1024",
            "--max_statistics_memory", "2.7MB", "--output_file", str(file),
        ],
        capture_output=True, text=True, timeout=290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank " in done.stdout
    (sketched,) = json.loads(file.read_text())["limits"]
    assert sketched["layers"]["mlp.gate_proj"]["kind"] == "moment"
    assert sketched["layers"]["mlp.down_proj"]["energy_held"] >= 0.95
