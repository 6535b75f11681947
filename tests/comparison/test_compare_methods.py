"""The comparison of methods: resumes, refuses what cannot be compared, and writes what people read."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.comparisons import Prepared
from helpers.models import learned, make_vit
from helpers.rows import separable, tensor_dataset
from helpers.training import quiet_config
from PIL import Image
from rich.console import Console
from transformers import ViTImageProcessorPil

from unsc_hf import UNSCConfig, UNSCError, split_dataset
from unsc_hf.comparison.compare_methods import ComparisonArguments, audit, compare, compare_methods
from unsc_hf.comparison.experiment import Experiment, identity, once, read_data
from unsc_hf.comparison.forget_set import rank
from unsc_hf.comparison.methods import METHODS
from unsc_hf.comparison.parallel import Job, share, work
from unsc_hf.comparison.report import write_comparison
from unsc_hf.comparison.summary import table
from unsc_hf.data.selection import Request


@dataclass
class World:
    arguments: Prepared
    comparison: ComparisonArguments
    config: Callable[[str], UNSCConfig]
    originals: list[str]
    references: list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("models")
    draw = separable()
    data = DatasetDict(train=draw(30), test=draw(20))
    retain = split_dataset(data["train"], forget_classes=["frog"]).retain

    def kept(name: str, rows: Dataset) -> str:
        learned(rows).save_pretrained(folder / name)
        return str(folder / name)

    originals = [kept(f"original-{i}", data["train"]) for i in range(2)]
    references = [kept(f"retrained-{i}", retain) for i in range(4)]

    def config(name: str) -> UNSCConfig:
        options = {"energy": 0.9, "max_steps": 20, "displacement_decay": 0.0, "learning_rate": 1e-3}
        return quiet_config(folder / name, max_leak=None, **options)

    arguments = Prepared(
        dataset_name="made here", forget_classes=["frog"], retrained_model_name_or_path=references, data=data
    )
    comparison = ComparisonArguments(methods=["unsc", "masked", "gradient_ascent"], seeds=[0, 1], originals=originals)
    return World(arguments, comparison, config, originals, references)


@pytest.fixture(scope="module")
def result(world: World) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as processes that share the work have
    yield compare_methods(world.comparison, world.arguments, world.config("whole"))
    torch.set_num_threads(threads)


def timeless(found: Any) -> Any:
    """Without what a clock says."""
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if key != "seconds"}
    return [timeless(value) for value in found] if isinstance(found, list) else found


@pytest.mark.slow
def test_several_processes_find_what_one_finds(world: World, result: dict[str, Any]) -> None:
    said = StringIO()
    comparison = replace(world.comparison, jobs=2)
    found = compare_methods(comparison, world.arguments, world.config("spread"), Console(file=said, width=200))
    assert timeless(found) == timeless(result)
    lines = said.getvalue().splitlines()
    count = len(lines)
    assert all(line.startswith(f"[{i + 1}/{count}] ") for i, line in enumerate(lines))
    assert any("on 12 validation rows, relearning: learning rate" in line for line in lines)


_FAILS = """
from unsc_hf.comparison.methods import method

@method("fails")
def fails(bench):
    {}
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "raise RuntimeError('first line\\nsecond')",
            "jobs: 'fails-0' failed, RuntimeError: first line; without",
        ),
        ("import os; os.kill(os.getpid(), 9)", "jobs: a process died, perhaps for lack of memory"),
        ("from unsc_hf import UNSCError; raise UNSCError('name: seen; do this.')", "^name: seen; do this.$"),
    ],
)
def test_a_process_that_fails_is_told_in_one_line(world: World, tmp_path: Path, what: str, said: str) -> None:
    (tmp_path / "fails.py").write_text(_FAILS.format(what))
    comparison = replace(
        world.comparison, plugins=[str(tmp_path / "fails.py")], methods=["fails"], audits=["collateral"], seeds=[0],
        originals=world.originals[:1], no_intervals=True, jobs=1,
    )  # fmt: skip
    arguments = replace(world.arguments, retrained_model_name_or_path=None)
    try:
        with pytest.raises(UNSCError, match=said) as caught:
            compare_methods(comparison, arguments, world.config(f"fails-{len(what)}"))
    finally:
        METHODS.pop("fails", None)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    place = Path(world.config(f"fails-{len(what)}").output_dir, "_runs", "frog")
    assert (place / "original-0.json").is_file()  # what was done stays
    assert not (place / "fails-0.json").exists()


def test_a_file_is_made_once_whoever_asks(tmp_path: Path) -> None:
    made: list[int] = []

    def make(file: Path) -> None:
        made.append(1)
        time.sleep(0.05)
        file.write_text("done")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: once(tmp_path / "one", make).read_text(), range(8)))
    assert made == [1]
    assert found == ["done"] * 8


def _slow_jobs(folder: Path) -> list[Job]:
    """Two of them need the first, and make it where it is missing; each notes who has made it."""

    def write(file: Path) -> None:
        time.sleep(0.5)
        file.write_text(str(os.getpid()))

    def make(name: str, needs: str | None = None) -> None:
        if needs is not None:
            make(needs)
        once(folder / name, write)

    needs = {"there": None, "first": None, "one": "first", "two": "first", "three": "first"}
    return [Job(name, folder / name, partial(make, name, need)) for name, need in needs.items()]


@pytest.mark.parametrize("processes", [None, 2])
def test_missing_files_are_made_by_whoever_is_free(processes: int | None, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    jobs = _slow_jobs(tmp_path)
    again = partial(_slow_jobs, tmp_path)
    done = [job.name for job in (work(jobs) if processes is None else share(jobs, again, processes))]
    assert sorted(done) == ["first", "one", "three", "two"]
    makers = {name: (tmp_path / name).read_text() for name in done}
    assert len(set(makers.values())) == (processes or 1)
    assert (str(os.getpid()) in makers.values()) == (processes is None)
    assert not (tmp_path / "there").read_text()
    assert list(share(jobs, again, 2)) == list(work(jobs)) == []


def test_every_method_and_reference_is_examined_on_every_seed(world: World, result: dict[str, Any]) -> None:
    found = result["forget_sets"]["frog"]
    assert list(found["runs"]) == ["original", "unsc", "masked", "gradient_ascent"]
    assert all(len(records) == 2 for records in found["runs"].values())
    assert len(found["references"]) == 4
    assert found["forgotten"] == [2]
    assert result["validation_rows"] + result["test_rows"] == 60
    for records in found["runs"].values():
        for run in records:
            assert 0 <= run["AccDut"] <= 1
            assert {"membership", "probe", "prototype", "relearning", "fine_tuning", "quantisation"} <= set(
                run["audits"]
            )
    assert found["runs"]["original"][0]["AccDut"] > 0.8
    assert found["runs"]["masked"][0]["AccDut"] == 0.0
    assert found["runs"]["masked"][0]["AccDrt"] >= found["runs"]["original"][0]["AccDrt"]
    assert len(found["settings"]["unsc"]["tries"]) == 3
    assert found["settings"]["masked"]["tries"] == []
    chosen = found["settings"]["unsc"]
    best = max(chosen["tries"], key=lambda t: (t["AccDut"] <= 0.01, t["AccDrt"] - t["AccDut"]))
    assert chosen["chosen"] == best["settings"]


def test_a_stopped_comparison_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}

    def counted(name: str, method: Any) -> Callable[..., Any]:
        def run(bench: Any, **settings: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return method.run(bench, **settings)

        return run

    for name in world.comparison.methods or ():
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], run=counted(name, METHODS[name])))
    comparison, config = replace(world.comparison, audits=["collateral"]), world.config("once")
    arguments = replace(world.arguments, retrained_model_name_or_path=None)
    first = compare_methods(comparison, arguments, config)
    # Three tries on the first seed, and a run on the second: the try that won is not run again.
    assert counts == {"unsc": 4, "gradient_ascent": 4, "masked": 2}
    assert json.dumps(compare_methods(comparison, arguments, config)) == json.dumps(first)
    killed = (("unsc", 0), ("gradient_ascent", 1))  # after the tries, and in a run
    for name, seed in killed:
        Path(str(config.output_dir), "_runs", "frog", f"{name}-{seed}.json").unlink()
    again = compare_methods(comparison, arguments, config)
    assert counts == {"unsc": 5, "gradient_ascent": 5, "masked": 2}
    for name, seed in killed:  # the same run, to rounding
        ours, before = (found["forget_sets"]["frog"]["runs"][name][seed] for found in (again, first))
        assert [ours[key] for key in ("AccDut", "AccDrt")] == pytest.approx(
            [before[key] for key in ("AccDut", "AccDrt")], abs=0.05
        )


def test_files_for_every_reader(world: World, result: dict[str, Any], tmp_path: Path) -> None:
    summaries = write_comparison(result, tmp_path, "python recipes/compare_methods.py image")
    summary, place = summaries["frog"], tmp_path / "frog"
    rows = table(summary)
    assert [row[0] for row in rows[1:]] == [
        "original", "UNSC", "masked logits", "gradient ascent", "retrained", "false alarms on retrained models",
    ]  # fmt: skip
    assert all(len(row) == len(rows[0]) for row in rows)
    lines = (place / "table.md").read_text().strip().splitlines()
    assert lines[0] == "# Forgetting frog: methods compared"
    assert len(lines[2:]) == len(rows) + 1
    masked = json.loads((tmp_path / "comparison.json").read_text())["summaries"]["frog"]["rows"]["masked"]
    assert (masked["verdict"], masked["cells"]["AccDut"]["mean"]) == ("suppressed", 0.0)
    for name in ("front", "flips"):
        with Image.open(place / f"{name}.png") as picture:
            assert len(picture.convert("L").resize((80, 60)).getcolors() or []) > 5

    page = (place / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"<script|https?://|src=\"(?!data:)", page)
    texts = "What was asked|frog|Verdicts|suppressed|Settings|gradient ascent|recipes/compare_methods.py"
    assert all(text in page for text in texts.split("|"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["unsk"]}, "methods: 'unsk' does not exist; closest: 'unsc'"),
        ({"audits": ["prob"]}, "audits: 'prob' does not exist; closest: 'probe'"),
        ({"jobs": 0}, "jobs: 0 given; it is a number of processes, at least 1"),
        ({"seeds": [3]}, "seeds: 1 given, an interval needs at least two"),
        ({"seeds": [0, 0, 1]}, r"seeds: \[0, 0, 1\] names one twice"),
        ({"originals": ["a", "b", "c"]}, "originals: 3 given for 2 seeds"),
        ({"plugins": ["gone.py"]}, "is no Python file"),
        ({"plugins": ["broken.py"]}, "ValueError: no good"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    world: World, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config("refused")
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("raise ValueError('no good')", encoding="utf-8")
    with pytest.raises(UNSCError, match=message):
        compare_methods(replace(world.comparison, **options), world.arguments, config)
    assert not Path(config.output_dir).exists()


OTHERS: list[tuple[str, str, Callable[[World], Any], str]] = [
    ("arguments", "data", lambda w: DatasetDict({k: v.skip(5) for k, v in w.arguments.data.items()}), "data"),
    ("arguments", "forget_classes", lambda w: ["dog"], r"classes \(\[2\] there, \[1\] now\)"),
    (
        "arguments",
        "retrained_model_name_or_path",
        lambda w: w.references[:3],
        r"the retrained models \(.* there, .* now",
    ),
    ("comparison", "originals", lambda w: w.originals[::-1], r"the original of seed 0 \(original-0 \w+ there"),
    ("config", "energy", lambda w: 0.5, "options"),
]


@pytest.mark.parametrize(("part", "name", "other", "said"), OTHERS)
def test_a_folder_of_another_comparison_is_refused(
    world: World, result: dict[str, Any], part: str, name: str, other: Callable[[World], Any], said: str
) -> None:
    parts = {"comparison": replace(world.comparison), "arguments": replace(world.arguments)}
    parts["config"] = world.config("whole")
    setattr(parts[part], name, other(world))
    with pytest.raises(UNSCError, match=f"holds a comparison that differs in {said}"):
        compare_methods(**parts)


def test_a_comparison_is_launched_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config("launched")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UNSCError, match="a comparison was launched as 2 processes; start it once"):
        compare_methods(world.comparison, world.arguments, config)


def test_models_are_trained_on_the_named_column_of_bare_ids(tmp_path: Path) -> None:
    rows = tensor_dataset(torch.randn(12, 3, 8, 8), [0, 1, 2] * 4, ["a", "b", "c"])
    rows = rows.rename_column("label", "fine").add_column("coarse", [0, 1] * 6)
    arguments = Prepared(
        data=DatasetDict(train=rows, test=rows), train_original=True, model_size="tiny", references_dir=str(tmp_path)
    )
    asked: list[tuple[Any, ...]] = []

    def train(*given: Any, vocabulary: Dataset) -> Path:
        asked.append(given)
        return tmp_path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unsc_hf.comparison.experiment.train_model", train)
        config = quiet_config(tmp_path, label_column="coarse")
        data, request = read_data(arguments, config), Request(forget_classes=(1,))
        Experiment([0], None, arguments, config, data, tmp_path, request).original(0)
    assert asked[0][4:6] == (["0", "1"], "coarse")


def test_a_reference_that_knows_the_forgotten_class_is_named(world: World) -> None:
    arguments = replace(world.arguments, retrained_model_name_or_path=[world.references[0], world.originals[0]])
    with pytest.raises(
        UNSCError, match=r"original-0 recognises \d+% of the forgotten classes, so it was trained on them"
    ):
        compare_methods(world.comparison, arguments, world.config("wrong-reference"))


def test_without_references_a_report_comes_and_says_what_cannot_be_said(world: World, tmp_path: Path) -> None:
    arguments = replace(world.arguments, retrained_model_name_or_path=None)
    comparison = replace(
        world.comparison, methods=["masked"], audits=["membership", "quantisation"], seeds=[0],
        originals=world.originals[:1], no_intervals=True,
    )  # fmt: skip
    found = compare_methods(comparison, arguments, world.config("alone"))
    summary = write_comparison(found, tmp_path, "command")["frog"]
    assert summary["rows"]["masked"]["verdict"] == "suppressed"
    assert "retrained" not in summary["rows"]
    page = (tmp_path / "frog" / "report.html").read_text()
    assert "With 0 retrained models no verdict can be &#39;removed&#39;" in page
    assert page.count("data:image/png;base64,") == 2


def test_a_model_of_anybody_is_audited_beside_its_original(world: World, tmp_path: Path) -> None:
    model = type(learned(world.arguments.data["train"])).from_pretrained(world.originals[0])
    with torch.no_grad():
        model.classifier.bias[2] -= 1e4  # only the last layer was muted
    model.save_pretrained(tmp_path / "muted")
    comparison = replace(world.comparison, originals=world.originals[:1])
    muted = str(tmp_path / "muted")
    result = compare_methods(comparison, world.arguments, world.config("audited"), audited=muted)
    (summary,) = write_comparison(result, Path(world.config("audited").output_dir), "command").values()
    assert summary["rows"]["muted"]["cells"]["AccDut"]["mean"] == 0.0
    assert summary["rows"]["muted"]["verdict"] == "suppressed"
    assert summary["rows"]["muted"]["outside"]
    runs = result["forget_sets"]["frog"]["runs"]
    assert runs["muted"][0]["audits"]["probe"] == runs["original"][0]["audits"]["probe"]
    page = (Path(world.config("audited").output_dir) / "frog" / "report.html").read_text()
    assert "muted: suppressed" in page or ">muted<" in page


def test_python_users_compare_and_audit_models_with_functions(world: World, tmp_path: Path) -> None:
    model = type(learned(world.arguments.data["train"])).from_pretrained(world.originals[0])
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    given = {
        "dataset": world.arguments.data, "forget_classes": ["frog"], "processing_class": processor,
        "audits": ["membership"], "config": world.config("unused"),
    }  # fmt: skip
    found = compare(model, methods=["masked"], seeds=[0], output_dir=tmp_path / "compared", **given)
    assert [row[0] for row in found.table] == ["method", "original", "masked logits"]
    assert "| masked logits | 0.0 |" in str(found)
    assert (found.save() / "frog" / "report.html").is_file()
    assert not Path(world.config("unused").output_dir).exists()
    masked = METHODS["masked"].run(SimpleNamespace(fresh=lambda: deepcopy(model), forgotten=[2]))
    other = audit(masked, model, output_dir=tmp_path / "audited", **given)
    assert other.table[2][1:3] == found.table[2][1:3]
    with pytest.raises(UNSCError, match="task: got 'sound'; choose from image, text"):
        compare(model, seeds=[0], task="sound", output_dir=tmp_path / "sound", **given)
    given["dataset"] = DatasetDict(train=world.arguments.data["train"])
    with pytest.raises(UNSCError, match="dataset: has no split 'test', only train"):
        compare(model, seeds=[0], output_dir=tmp_path / "half", **given)


def test_a_mean_of_one_percent_counts_as_forgotten() -> None:
    """Three of 300 rows, averaged over classes, may come out as 0.010000000000000002."""
    share = 0.010000000000000002
    assert rank({"AccDut": share, "AccDrt": 0.5}) > rank({"AccDut": 0.0, "AccDrt": 0.4})
    assert rank({"AccDut": 0.0101, "AccDrt": 0.9}) < rank({"AccDut": 0.0, "AccDrt": 0.4})


def test_models_of_one_name_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    model = make_vit()
    for place in ("a", "b"):
        model.save_pretrained(tmp_path / place / "checkpoint-5")
    same = [identity(str(tmp_path / place / "checkpoint-5")) for place in ("a", "b")]
    assert same[0] == same[1]
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "b" / "checkpoint-5")
    assert identity(str(tmp_path / "b" / "checkpoint-5")) != same[0]


@pytest.mark.timeout(60)
def test_a_job_that_no_process_knows_is_named(tmp_path: Path) -> None:
    job = Job("unsc-0", tmp_path / "never.json", lambda: None)
    with pytest.raises(UNSCError, match="^jobs: no process can make 'unsc-0'"):
        list(share([job], list, 1))  # `list` makes no job at all
