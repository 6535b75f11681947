"""Two processes, with replicated (DDP) or sharded weights (FSDP2), end where one does; a killed one ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import two_processes
from helpers.models import make_vit
from helpers.recipes import FAST, RECIPE, parquet_folder, run_process
from peft import PeftModel
from safetensors.torch import load_file

from unsc_hf.trainer.checkpoints import find_checkpoint

pytestmark = pytest.mark.slow

SCRIPT = two_processes.__file__
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what one process found in `one`, and what two found in `two`."""
    root = tmp_path_factory.mktemp("processes")
    for case in two_processes.CASES:
        two_processes.unlearn(case, root / "one" / case)
    two_processes.statistics(root / "one" / "statistics")
    run_process(*TORCHRUN, SCRIPT, "cases", root / "two")
    return root


def test_the_same_moments(root: Path) -> None:
    one, two, also = (load_file(root / f"{f}.safetensors") for f in
                      ("one/statistics/moments-0", "two/statistics/moments-0", "two/statistics/moments-1"))  # fmt: skip
    assert one.keys() == two.keys()
    assert "passes" in {name.split(".")[0] for name in one}
    for name, moment in one.items():
        assert (two[name] - moment).norm() <= 1e-10 * moment.norm()
        assert torch.equal(two[name], also[name])


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, name) for name, case in two_processes.CASES.items() for kind in case.kinds]
)
def test_the_same_model(root: Path, kind: str, case: str) -> None:
    one, two = root / "one" / case, root / "two" / kind / case
    found = [json.loads((two / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((one / "found-0.json").read_text())
    assert found[0] == found[1]  # every process ends with the same weights, metrics and certificate
    assert ("FSDP" in found[0]["class"]) == (kind == "sharded")
    for name, value in alone["metrics"].items():
        assert found[0]["metrics"][name] == pytest.approx(value, abs=0 if name.endswith("accuracy") else 1e-5)
    for name in ("leak", "drift", "change"):
        assert found[0][name] == pytest.approx(alone[name], rel=1e-4)
    labels = [load_file(folder / "labels-0.safetensors")["labels"] for folder in (one, two)]
    torch.testing.assert_close(labels[1], labels[0], rtol=0, atol=1e-6)
    assert torch.equal(labels[1].argmax(-1), labels[0].argmax(-1))

    file = "adapter_model.safetensors" if case == "adapters" else "model.safetensors"
    ours, theirs = load_file(one / "model" / file), load_file(two / "model" / file)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (theirs[name] - weight).norm() <= 1e-5 * weight.norm().clamp_min(1e-3)
    saved = json.loads((two / "model" / "config.json").read_text()) if case != "adapters" else None
    assert saved is None or not saved["architectures"][0].startswith("FSDP")
    assert not any("pickle" in p.name or p.suffix in (".bin", ".pt") for p in (two / "model").iterdir())


def test_adapters_of_two_processes_load(root: Path) -> None:
    loaded = PeftModel.from_pretrained(make_vit(), root / "two" / "sharded" / "adapters" / "model")
    assert any(bool(weight.any()) for name, weight in loaded.named_parameters() if ".lora_B." in name)


def test_the_recipe_on_two_processes(tmp_path: Path) -> None:
    words = ["--dataset_name", parquet_folder(tmp_path / "data"), "--references_dir", tmp_path / "references", *FAST,
             "--forget_classes", "frog", "--train_original", "--train_retrained", "--controls", "false"]  # fmt: skip
    batch = "--per_device_train_batch_size"
    written = run_process(*TORCHRUN, RECIPE, *words, "--output_dir", tmp_path / "two", batch, 32)
    assert written.count("Verdict:") == 1
    run_process(RECIPE, *words, "--output_dir", tmp_path / "one", batch, 64)
    two, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    for method, result in one["methods"].items():
        for figure in ("AccDf", "AccDr", "AccDut", "AccDrt"):
            assert two["methods"][method][figure] == pytest.approx(result[figure], abs=0.03), (method, figure)
    assert one["methods"]["original"]["per_class"] == two["methods"]["original"]["per_class"]


def test_a_killed_process_ends_the_run_and_leaves_its_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, *TORCHRUN, SCRIPT, "endless", out], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoint-*/unsc_state.json")):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = [p for p in psutil.Process(run.pid).children() if str(SCRIPT) in p.cmdline()]
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGKILL)
        assert run.wait(timeout=60) != 0
    finally:
        run.kill()
    reached = int(Path(str(find_checkpoint(True, out))).name.removeprefix("checkpoint-"))
    trainer = two_processes.unlearn("vit", out, resume=True, max_steps=reached + 2, **two_processes.CAREFUL)
    assert trainer.state.global_step == reached + 2
