"""Hundreds of requests, killed again and again: they end where requests that nobody killed end."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import soak_worker
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from unsc_hf import ActivationStatistics

REQUESTS, KILLS = 200, 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_requests_killed_anywhere_end_at_the_same_weights(tmp_path: Path) -> None:
    """Classes, rows and adapters. A kill comes somewhere in the request after a random one, or just between two."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.soak_worker", "transformers.models.vit.modeling_vit"])

    def start(name: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(
            target=soak_worker.serve, args=(str(tmp_path / name), REQUESTS, str(tmp_path / "log"))
        )
        process.start()
        return process

    def done() -> int:
        try:
            return soak_worker.found(tmp_path / "killed")[1]
        except FileNotFoundError:  # a folder was being removed
            return 0

    started, whole = time.perf_counter(), start("whole")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "log").read_text()
    length = (time.perf_counter() - started) / REQUESTS

    killed = 0
    for goal in sorted(random.sample(range(REQUESTS), KILLS)):
        begun, before, process = time.perf_counter(), done(), start("killed")
        while process.is_alive() and done() < goal:
            time.sleep(length / 20)
        served = max(done() - before, 1)
        time.sleep(random.uniform(0, min(length, (time.perf_counter() - begun) / served)))
        killed += process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
    assert killed >= KILLS - 2
    last = start("killed")
    last.join()
    assert last.exitcode == 0, (tmp_path / "log").read_text()

    ends = []
    for name in ("whole", "killed"):
        era, count = soak_worker.found(tmp_path / name)
        assert count == REQUESTS
        assert [path.name for path in (tmp_path / name).iterdir()] == [era.name]
        last_model = era / f"request-{REQUESTS - soak_worker.number(era)}"
        model = ViTForImageClassification.from_pretrained(last_model)
        assert len(ActivationStatistics.from_pretrained(era / "statistics", model).requests) == 10
        ends.append(load_file(last_model / "model.safetensors"))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
