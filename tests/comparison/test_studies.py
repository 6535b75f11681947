"""Studies: each runs, resumes, writes what people read; the exact ones are exact, the attacks are what they say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers.comparisons import Prepared
from helpers.recipes import NAMES, image_folder
from helpers.training import quiet_config

from unsc_hf import UNSCConfig, UNSCError
from unsc_hf.comparison.arguments import ImageArguments
from unsc_hf.comparison.experiment import Experiment, read_data
from unsc_hf.comparison.methods import Workbench
from unsc_hf.comparison.run_studies import AblationArguments, run_studies, write_study
from unsc_hf.comparison.studies import (
    STUDIES,
    Lab,
    Panel,
    Points,
    calibration,
    first_order,
    many_classes,
    poison,
    rank,
    study,
)
from unsc_hf.comparison.studies import requests as request_study
from unsc_hf.data.columns import read_labels


class Images(Prepared):
    """Small pictures in memory, with the image processor of the model that is trained on them."""

    load_processor = ImageArguments.load_processor


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Images:
    train, test = (image_folder(rows, int(torch.randint(2**31, ()))) for rows in (160, 60))
    return Images(
        dataset_name="made here", forget_classes=["frog"], train_original=True, train_retrained=True, model_size="nano",
        patch_size=4, train_epochs=8, references_dir=str(tmp_path_factory.mktemp("references")),
        data=DatasetDict({"train": train, "test": test}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> UNSCConfig:
    return quiet_config(tmp_path_factory.mktemp("studies"), max_steps=10, learning_rate=1e-3, energy=0.9)


@pytest.fixture(scope="module")
def finished(arguments: Images, config: UNSCConfig) -> dict[str, str]:
    """Every study, on fewer settings."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, fewer in (
            (rank, "_ENERGIES", (0.9, 1.0)),
            (rank, "_SHARES", (0.25,)),
            (rank, "_RATIOS", (1.0,)),
            (calibration, "_BATCHES", (8, 32, 64)),
            (request_study, "COUNTS", (1, 2, 3)),
            (poison, "LIMITS", {name: poison.LIMITS[name] for name in ("leak 0.1", "no projection")}),
            (poison, "_FLIPPED", (0.5,)),
            (many_classes, "_SHARES", (0.3, 0.9)),
            (many_classes, "_WAYS", {"UNSC": {}, "no projection": {"null_space": "none"}}),
        ):
            patch.setattr(module, name, fewer)
        return run_studies(AblationArguments(seeds=[0]), arguments, config, "python recipes/ablate.py image")


def test_each_study_writes_numbers_a_picture_and_two_sentences(finished: dict[str, str], config: UNSCConfig) -> None:
    assert list(finished) == list(STUDIES)
    for name, conclusion in finished.items():
        folder = Path(str(config.output_dir)) / name
        found = json.loads((folder / "study.json").read_text(), parse_constant=pytest.fail)
        assert found["paragraph"] == conclusion
        assert re.search(r"\d", conclusion)
        assert "nan" not in conclusion, conclusion
        assert len(re.findall(r"[.] [A-Z]", conclusion)) <= 1, conclusion
        assert len(found["points"]) >= 3
        assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
        page = (folder / "report.html").read_text()
        assert "://" not in page
        assert conclusion.split(".")[0][:30] in page
        assert STUDIES[name].title in (folder / "README.md").read_text()


def test_the_retained_loss_stays_at_energy_one_and_only_there(finished: dict[str, str], config: UNSCConfig) -> None:
    points = json.loads((Path(str(config.output_dir)) / "first-order" / "study.json").read_text())["points"]
    by = {(p["energy"], p["size"]): p for p in points}
    assert set(by) == {(e, s) for e in first_order.ENERGIES for s in first_order.SIZES}
    for (energy, size), p in by.items():
        if energy == 1.0:
            assert abs(p["changed"]) < 1e-9, (size, p)
            assert abs(p["predicted"]) < 1e-9
            assert p["leak"] < 1e-6
    free = by[0.0, 1.0]
    assert abs(free["changed"]) > 1e-4
    small = by[0.0, 0.001]
    # Where slopes happen to cancel, what is left is of second order: a hundredth of what it is at ten times the size.
    larger = by[0.0, 0.01]
    second_order = max(abs(larger["changed"] - larger["predicted"]) / 20, 1e-4 * abs(free["changed"]))
    assert small["changed"] == pytest.approx(small["predicted"], rel=0.1, abs=second_order)
    leaks = [by[energy, 0.1]["leak"] for energy in first_order.ENERGIES]
    assert leaks == sorted(leaks)


def test_what_is_finished_is_not_run_again(
    finished: dict[str, str], arguments: Images, config: UNSCConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "unlearn", lambda *a, **k: pytest.fail("ran again"))
    again = run_studies(AblationArguments(studies=["null-space"], seeds=[0]), arguments, config, "again")
    assert again["null-space"] == finished["null-space"]


def test_a_setting_without_capacity_is_a_row_and_not_the_end(finished: dict[str, str], config: UNSCConfig) -> None:
    points = json.loads((Path(str(config.output_dir)) / "rank" / "study.json").read_text())["points"]
    failed = [p for p in points if "error" in p]
    if not failed:
        points.append({"rule": "energy", "setting": 1.5, "seed": 0, "error": "energy: outside"})
        failed = points[-1:]
    rows = STUDIES["rank"].table(points)
    assert all(len(row) == len(rows[0]) for row in rows)
    assert any(failed[0]["error"] in cell for row in rows for cell in row)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"studies": ["null_space"]}, "studies: 'null_space' does not exist; closest: 'null-space'"),
        ({"seeds": []}, "seeds: none given"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, Any], said: str, arguments: Images, config: UNSCConfig) -> None:
    ablation = replace(AblationArguments(seeds=[0]), **changes)
    with pytest.raises(UNSCError, match=re.escape(said)):
        run_studies(ablation, arguments, config, "")


def test_a_folder_of_another_study_is_refused(finished: dict[str, str], arguments: Images, config: UNSCConfig) -> None:
    other = replace(arguments, forget_classes=["owl"])
    with pytest.raises(UNSCError, match="holds a study that differs in classes"):
        run_studies(AblationArguments(studies=["rank"], seeds=[0]), other, config, "")


# ---- attacks --------------------------------------------------------------------------------------------------------
def _lab(arguments: Images, config: UNSCConfig, tmp_path: Path) -> Lab:
    experiment = Experiment([0], None, arguments, config, read_data(arguments, config), tmp_path)
    return Lab(experiment, "poison")


def test_a_trigger_is_on_every_row_and_nowhere_else() -> None:
    rows = image_folder(6, 0)
    before = [np.asarray(image) for image in rows["image"]]
    for old, row in zip(before, poison.triggered(rows), strict=True):
        new = np.asarray(row["image"])
        assert (new[-2:, -2:] == 255).all()
        untouched = np.ones(new.shape[:2], dtype=bool)
        untouched[-2:, -2:] = False
        assert (new[untouched] == old[untouched]).all()
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    texts = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    assert poison.triggered(texts)["text"][:] == ["cf cf a", "cf cf b"]
    assert poison.triggered(texts)["label"][:] == [0, 1]


def test_flipped_rows_enter_the_request_and_leave_what_is_kept(
    arguments: Images, config: UNSCConfig, tmp_path: Path
) -> None:
    lab = _lab(arguments, config, tmp_path)
    bench, relabel = poison.flipped_labels(lab, 0, share=0.5)
    assert relabel is None
    assert set(read_labels(bench.forget).tolist()) == {2}
    assert len(bench.forget) == 60
    assert len(bench.retain) == 100
    pictures = {np.asarray(image).tobytes() for image in bench.forget["image"]}
    assert len(pictures & {np.asarray(image).tobytes() for image in bench.retain["image"]}) == 0
    own = {np.asarray(image).tobytes() for image in lab.experiment.forget["image"]}
    assert len(pictures - own) == 20


def test_a_backdoor_stamps_half_and_asks_for_one_class(arguments: Images, config: UNSCConfig, tmp_path: Path) -> None:
    bench, relabel = poison.backdoor(_lab(arguments, config, tmp_path), 0)
    stamped = [bool((np.asarray(image)[-2:, -2:] == 255).all()) for image in bench.forget["image"]]
    assert sum(stamped) == len(stamped) // 2
    outputs = type("Outputs", (), {"labels": [2] * 5})
    assert relabel is not None
    assert relabel(None, None, outputs).tolist() == [0] * 5  # type: ignore[arg-type]


def test_a_study_of_ones_own_is_one_decorated_function(tmp_path: Path) -> None:
    @study(
        "What is mine?", tags={"kind": "kind"}, panels=[Panel("AccDrt", "kind")],
        conclude=lambda points: f"It is {points.listed('kind', 'AccDrt')}.",
    )  # fmt: skip
    def my_study(lab: Lab) -> Iterator[dict[str, Any]]:
        for seed in (0, 1, 2):
            yield {"kind": "good", "seed": seed, "AccDut": 0.0, "AccDrt": 0.9 + 0.01 * seed, "leak": 0.02}
        yield {"kind": "bad", "seed": 0, "error": "energy: too large"}

    mine = STUDIES.pop("my-study")
    points = Points(my_study(None))
    half = 4.302652729911275 * 0.01 / math.sqrt(3)
    cells = f"91.0 ± {100 * half:.1f}"
    assert mine.table(points)[1:] == [["good", "0.0", cells, "0.02", "–", "–"], ["bad", "energy: too large", *[""] * 4]]
    assert write_study(mine, points, tmp_path, "command") == f"It is good: {cells}."
    assert (tmp_path / "study.png").is_file()
    assert cells in (tmp_path / "README.md").read_text()
