"""Two gloo processes give the moments of one, and both hold the same unlearned weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]),
    ):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), str(tmp_path / name)],
            capture_output=True, text=True, timeout=240, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two, also = (
        load_file(tmp_path / f)
        for f in ("one/moments-0.safetensors", "two/moments-0.safetensors", "two/moments-1.safetensors")
    )
    assert one.keys() == two.keys()
    assert {name.split(".")[0] for name in one} >= {"sketch", "trace", "sample", "stands for"}
    for name, moment in one.items():
        if name.startswith("sample"):  # the same rows, as each process has read them
            assert two[name].shape == moment.shape
            assert torch.cdist(moment, two[name]).amin(1).max() < 1e-3 * moment.norm(dim=1).max()
            assert torch.equal(two[name], also[name])
            continue
        assert (two[name] - moment).norm() <= 1e-10 * moment.norm()
        assert torch.equal(two[name], also[name])
    assert (tmp_path / "two" / "hash-0").read_text() == (tmp_path / "two" / "hash-1").read_text()
