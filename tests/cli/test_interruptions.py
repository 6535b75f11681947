"""kill -9 at any moment: the same command, started again, ends at the same weights and trusts no half-written file."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from helpers import kill_worker
from helpers.models import learned
from helpers.rows import tensor_dataset
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from unsc_hf.nullspace.statistics import ActivationStatistics
from unsc_hf.nullspace.storage import settle
from unsc_hf.utils.fingerprint import weight_hash

KILLS = int(os.environ.get("KILLS", "5"))
_MOST_IN_A_ROW = 6


class Runner:
    """Starts the command in processes that cost no imports."""

    def __init__(self, root: Path, common: list[str]) -> None:
        self.context = multiprocessing.get_context("forkserver")
        modules = ("cli.main", "runs.classification", "comparison.compare_methods", "comparison.report")
        self.context.set_forkserver_preload(["helpers.kill_worker", *(f"unsc_hf.{name}" for name in modules)])
        self.root, self.common = root, common

    def run(
        self, name: str, words: Sequence[str], seconds: float | None = None, largest: int | None = None
    ) -> int | None:
        """Exit code of a run into `root/name`, or None when it was killed after so many seconds.

        `largest`: size in bytes that no file may exceed.
        """
        place = self.root / name
        words = [*words[:2], *self.common, *words[2:], "--output_dir", str(place / "out")]
        if words[0] == "unlearn":
            words += ["--statistics_dir", str(place / "statistics")]
        place.mkdir(exist_ok=True)
        process = self.context.Process(target=kill_worker.unlearn, args=(words, str(place / "log"), largest))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        return process.exitcode


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    root = tmp_path_factory.mktemp("kills")
    means = np.random.default_rng().integers(60, 196, (3, 8, 8, 3))

    def draw(per_class: int) -> tuple[Dataset, Dataset]:
        """Images, and the same as the model reads them."""
        labels = [c for c in range(3) for _ in range(per_class)]
        noise = np.random.default_rng().normal(0, 25, (len(labels), 8, 8, 3))
        pixels = np.clip(means[labels] + noise, 0, 255).astype(np.uint8)
        features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "frog"])})
        raw = {"image": [PILImage.fromarray(p) for p in pixels], "label": labels}
        read = torch.tensor(pixels / 127.5 - 1.0, dtype=torch.float32).permute(0, 3, 1, 2)
        return Dataset.from_dict(raw, features=features), tensor_dataset(read, labels, ["cat", "dog", "frog"])

    images, inputs = draw(20)
    learned(inputs).save_pretrained(root / "original")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / "original")
    (root / "data").mkdir()
    images.to_parquet(root / "data" / "train.parquet")
    draw(8)[0].to_parquet(root / "data" / "test.parquet")
    return Runner(
        root,
        ["--dataset_name", str(root / "data"), "--forget_classes", "frog", "--use_cpu", "--disable_tqdm", "true",
         "--max_steps", "12", "--check_steps", "3", "--target_forget_accuracy", "0",
         "--per_device_train_batch_size", "5"],
    )  # fmt: skip


def kill_until(runner: Runner, words: list[str], kills: int, expect: Callable[[Path], None]) -> str:
    """Kill runs at random moments, some of them several times, let each end, and look at what it has left."""
    started = time.perf_counter()
    assert runner.run(f"{words[0]}-timed", words) == 0
    length = time.perf_counter() - started
    done = runs = 0
    while done < kills:
        name, runs, code = f"{words[0]}-{runs}", runs + 1, None
        for _ in range(_MOST_IN_A_ROW):
            code = runner.run(name, words, random.uniform(0.0, 1.1 * length))
            if code is not None:
                break
            done += 1
        if code is None:
            code = runner.run(name, words)
        log = (runner.root / name / "log").read_text()
        # Killed between its last file and its last breath it says that it is finished.
        assert code == 0 or (code == 2 and "holds a finished run" in log), log
        expect(runner.root / name)
    return f"{done} kills in {runs} runs of {length:.1f} s"


@pytest.mark.slow
def test_killed_anywhere_it_ends_at_the_same_weights(runner: Runner) -> None:
    words = [
        "unlearn", "image", "--model_name_or_path", str(runner.root / "original"), "--no_controls",
        "--save_strategy", "steps", "--save_steps", "3", "--resume_from_checkpoint", "true",
    ]  # fmt: skip

    assert runner.run("whole", words) == 0, (runner.root / "whole" / "log").read_text()
    expected = load_file(runner.root / "whole" / "out" / "model.safetensors")
    before = load_file(runner.root / "original" / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in expected.items())

    def expect(place: Path) -> None:
        out = place / "out"
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), (place / "log").read_text()
        assert (out / "results.json").is_file()
        assert not list(out.glob("_saving-*"))
        settle(place / "statistics", weight_hash(AutoModelForImageClassification.from_pretrained(out)))
        ActivationStatistics.from_pretrained(place / "statistics", AutoModelForImageClassification.from_pretrained(out))

    print(kill_until(runner, words, KILLS, expect))


@pytest.mark.parametrize("largest", [2_000, 30_000, 100_000])
def test_a_full_disk_is_one_line_and_the_run_can_go_on(runner: Runner, largest: int) -> None:
    words = ["unlearn", "image", "--model_name_or_path", str(runner.root / "original"), "--no_controls"]
    name = f"full-{largest}"
    assert runner.run(name, words, largest=largest) == 2
    log = runner.root / name / "log"
    lines = [line for line in log.read_text().splitlines() if "rror" in line]
    assert len(lines) == 1, log.read_text()
    assert lines[0].startswith("error: output_dir: no space is left on the disk"), lines[0]
    assert not (runner.root / name / "out" / "results.json").exists()
    assert runner.run(name, words) == 0, log.read_text()


@pytest.mark.slow
def test_a_killed_comparison_goes_on(runner: Runner) -> None:
    words = [
        "compare", "image", "--originals", str(runner.root / "original"), "--seeds", "0", "--no_intervals",
        "--methods", "unsc", "masked", "random_label", "--audits", "prototype", "membership",
    ]  # fmt: skip

    def numbers(place: Path) -> Any:
        return without_seconds(json.loads((place / "out" / "comparison.json").read_text())["forget_sets"])

    assert runner.run("compared", words) == 0, (runner.root / "compared" / "log").read_text()
    expected = numbers(runner.root / "compared")

    def expect(place: Path) -> None:
        assert numbers(place) == expected

    print(kill_until(runner, words, max(1, KILLS // 20), expect))


def without_seconds(value: Any) -> Any:
    """The same structure without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value
