"""The script for a GPU: what ended is not run again, and what failed is named."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder: Path, broken: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The script with an interpreter that notes its arguments, and fails where they name `broken`."""
    stand_in = folder / "python"
    stand_in.write_text(f'#!/usr/bin/env bash\necho "$@" >> {folder}/calls\n[[ "$*" != *{broken}* ]]\n')
    stand_in.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *options, str(folder / "data"), str(folder / "out")]
    return subprocess.run(
        command, env={**os.environ, "PYTHON": str(stand_in)}, capture_output=True, text=True, check=False
    )


def test_parts_that_ended_are_not_run_again_and_a_failure_is_named(tmp_path: Path) -> None:
    assert run(tmp_path, "nothing").returncode == 0
    again = run(tmp_path, "nothing")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) > 8
    assert again.stdout.count("done before") == len(calls)

    other = tmp_path / "other"
    other.mkdir()
    failing = run(other, "llama-8b")
    assert failing.returncode == 1
    assert "failed: cost-llama-8b" in failing.stdout
    assert len((other / "calls").read_text().splitlines()) == len(calls)  # the parts after it ran
    assert run(other, "nothing").returncode == 0
    assert len((other / "calls").read_text().splitlines()) == len(calls) + 1


def test_a_smoke_run_is_short_and_a_missing_folder_is_said(tmp_path: Path) -> None:
    assert run(tmp_path, "nothing", "--smoke").returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert "--smoke" in calls[-1]
    wrong = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh")], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "usage: benchmarks/gpu.sh" in wrong.stderr
