"""The page of a finished run: what it opens, what it answers, and what an attack brings back."""

from __future__ import annotations

import json
import runpy
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import DatasetDict
from helpers.app import ANIMALS, finished_image_run
from helpers.language import questions
from helpers.results import method_result
from helpers.stand_ins import images, write_splits
from helpers.texts import NAMES, texts
from peft import LoraConfig
from PIL import Image, ImageDraw

from unsc_hf import UNSCConfig, UNSCError, unlearn
from unsc_hf.app import OpenedRun, open_run
from unsc_hf.app.answering import ask, drawing_to_image, is_drawable, top, what_changed
from unsc_hf.app.attack import can_attack, relearn, what_came_back
from unsc_hf.cli.main import main
from unsc_hf.comparison.references.texts import LanguagePlan, TextPlan
from unsc_hf.data.dialogues import to_dialogues
from unsc_hf.reporting.tables import classifier_table

SPACE = Path(__file__).parents[2] / "space"


def config(**changes: Any) -> UNSCConfig:
    return UNSCConfig(use_cpu=True, disable_tqdm=True, max_steps=2, report_to="none", max_leak=None, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `out`, beside its data and references."""
    return finished_image_run(tmp_path_factory.mktemp("app")).parent


@pytest.fixture(scope="module")
def run(root: Path) -> OpenedRun:
    return open_run(root / "out")


def test_everything_beside_a_run_is_found(run: OpenedRun) -> None:
    assert list(run.models) == ["original", "unlearned", "retrained"]
    assert run.missing == []
    assert run.forgotten == [2]
    assert run.task == "image-classification"
    assert is_drawable(run)


def test_models_answer_side_by_side(run: OpenedRun) -> None:
    """An owl is an owl to the original alone, and the sentence says so; a cat stays a cat."""
    row = next(row for row in run.data["test"] if row["label"] == 2)
    answers = ask(run, row["image"])
    assert all(sum(shares.values()) == pytest.approx(1) for shares in answers.values())
    said = {title: top(shares) for title, shares in answers.items()}
    assert said["original"] == "owl"
    assert said["retrained"] != "owl"
    changed = {title: dict(shares) for title, shares in answers.items()}
    changed["unlearned"] = {"cat": 0.75, "dog": 0.25, "owl": 0.0}
    changed["original"] = {"cat": 0.04, "dog": 0.0, "owl": 0.96}
    changed["retrained"] = {"cat": 0.1, "dog": 0.9, "owl": 0.0}
    assert what_changed(run, changed) == (
        "owl was forgotten: owl (96 %) before, cat (75 %) now. "
        "A model that never saw what was forgotten says dog (90 %)."
    )
    kept = {**changed, "original": {"dog": 0.6, "cat": 0.4}}
    assert what_changed(run, kept).startswith("The answer changed: dog (60 %) before, cat (75 %) now.")
    assert what_changed(run, {**changed, "original": {"cat": 1.0}}).startswith("Nothing changed: cat, 100 % before")


def test_a_drawing_is_cut_out_and_bright_where_training_images_are_dark(run: OpenedRun) -> None:
    paper = Image.new("RGBA", (280, 280))
    assert drawing_to_image(paper, run.processors["unlearned"]) is None
    ImageDraw.Draw(paper).rectangle((100, 40, 119, 99), fill=(0, 0, 0, 255))
    for mean, ink in (([0.3], 255), ([0.7], 0)):
        processor = type("Processor", (), {"image_mean": mean})
        image = drawing_to_image(paper, processor)
        assert image.size == (60, 60)
        assert (image.getpixel((30, 30)), image.getpixel((2, 30))) == (ink, 255 - ink)
    assert set(ask(run, drawing_to_image(paper, run.processors["unlearned"]))["original"]) == set(ANIMALS)


def test_an_attack_trains_copies(run: OpenedRun) -> None:
    before = {title: ask(run, run.data["test"][0]["image"]) for title in run.models}
    done = list(relearn(run, 5, 3e-3))
    assert [one.title for one in done] == ["original", "unlearned", "retrained"]
    original = done[0]
    assert original.before > 0.9
    assert original.curve[-1] > 0.5
    assert done[2].before < 0.5 < done[2].curve[-1]
    assert {title: ask(run, run.data["test"][0]["image"]) for title in run.models} == before
    said = what_came_back(done, 5)
    assert said.startswith("Forgotten test rows that are recognised, with 5 examples a class: original ")


def test_what_was_moved_is_named_and_left_out(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "out", tmp_path / "far" / "away" / "out")
    moved = open_run(tmp_path / "far" / "away" / "out")
    assert list(moved.models) == ["unlearned"]
    assert moved.data is None
    assert not can_attack(moved)
    assert [sentence.partition(" was not")[0] for sentence in moved.missing] == [
        "The original", "The data set", "The retrained model",
    ]  # fmt: skip
    assert "--original" in moved.missing[0]
    assert "no original to compare" in what_changed(moved, ask(moved, Image.new("L", (8, 8))))
    named = open_run(tmp_path / "far" / "away" / "out", dataset=str(root / "data"))
    assert can_attack(named)
    other = images(["lion", "dog", "owl"], 2, 0, "L", "label")
    write_splits(tmp_path, train=other, test=other)
    with pytest.raises(UNSCError, match="^dataset: calls label 0 'cat', the data set 'lion'"):
        open_run(tmp_path / "far" / "away" / "out", dataset=str(tmp_path))
    for option in ("original", "retrained", "dataset"):
        with pytest.raises(UNSCError, match=f"^{option}: cannot load 'nowhere'"):
            open_run(tmp_path / "far" / "away" / "out", **{option: "nowhere"})


def test_a_text_is_classified(tmp_path: Path) -> None:
    data = DatasetDict(train=texts(20), test=texts(8, seed=1))
    for name, split in data.items():
        (tmp_path / "texts").mkdir(exist_ok=True)
        split.to_parquet(tmp_path / "texts" / f"{name}.parquet")
    bert, tokenizer = TextPlan(size="nano", vocabulary_size=200, max_length=16).start(data["train"], NAMES)
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    job: dict[str, Any] = {"controls": False, "config": config(), "output_dir": tmp_path / "out"}
    unlearn(str(tmp_path / "bert"), str(tmp_path / "texts"), forget_classes=["money"], **job)
    run = open_run(tmp_path / "out")
    assert list(run.models) == ["original", "unlearned"]
    assert list(ask(run, "rain and wind")["unlearned"]) == NAMES
    assert can_attack(run)
    with pytest.raises(UNSCError, match="^input: empty"):
        ask(run, "  ")


def test_an_adapter_of_a_language_model_replies(tmp_path: Path) -> None:
    rows = questions(8)
    llama, tokenizer = LanguagePlan(size="nano", vocabulary_size=300, max_length=64).start(to_dialogues(rows))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    options = config(target_forget_accuracy=0.0, rows_per_direction=None)
    job: dict[str, Any] = {"controls": False, "config": options, "output_dir": tmp_path / "out", "indices": [0, 1]}
    unlearn(tmp_path / "llama", DatasetDict(train=rows), peft_config=LoraConfig(r=2), **job)
    run = open_run(tmp_path / "out")
    assert run.task == "text-generation"
    assert list(run.models) == ["original", "unlearned"]
    answers = ask(run, "Where does P1 live?")
    assert all(0 < next(iter(shares.values())) <= 1 for shares in answers.values())
    assert what_changed(run, {**answers, "unlearned": {"I do not know.": 0.5}}) == "The answer changed."
    assert not can_attack(run)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nowhere", "folder: nowhere holds no results.json"),
        ("half", "folder: half holds an interrupted run"),
        ("bad", "folder: bad/results.json is not what a run writes"),
        ("user/nowhere", "folder: user/nowhere is no folder here, and no run on the Hub"),
    ],
)
def test_mistakes_are_one_line(
    folder: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", object())
    for name, file in (("half", ".unfinished"), ("bad", "results.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    assert main(["app", folder]) == 2
    seen = capsys.readouterr().err
    assert seen.startswith(f"error: {said}")
    assert seen.count("\n") == 1


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "anywhere"]) == 2
    assert capsys.readouterr().err == 'error: app: gradio is not installed; run pip install "unsc_hf[app]".\n'


def test_the_page_has_a_tab_for_what_is_there(root: Path, run: OpenedRun, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from unsc_hf.app import build

    def seen(opened: OpenedRun) -> tuple[list[str], str]:
        blocks = build(opened).get_config_file()["components"]
        return [b["props"]["label"] for b in blocks if b["type"] == "tabitem"], json.dumps(blocks)

    tabs, content = seen(run)
    assert tabs == ["Try it", "Report", "Attack it"]
    assert "Forgotten: owl" in content
    assert "srcdoc" in content
    shutil.copytree(root / "out", tmp_path / "away" / "from" / "out")
    (tmp_path / "away" / "from" / "out" / "report.html").unlink()
    tabs, content = seen(open_run(tmp_path / "away" / "from" / "out"))
    assert tabs == ["Try it"]
    assert "The data set was not found; name it with --dataset." in content


def test_a_port_in_use_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", str(root / "out"), "--port", str(port)]) == 2
    assert f"error: port: cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_the_space_runs_the_page(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script builds the page of the run that `RUN` names; its README asks for the version that is tested."""
    pytest.importorskip("gradio")
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr("unsc_hf.app.serve", lambda page, host: shown.append((page.title, host)))
    monkeypatch.setenv("RUN", str(root / "out"))
    runpy.run_path(str(SPACE / "app.py"))
    assert shown == [("Forgotten: owl", "0.0.0.0")]
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (header["sdk"], header["app_file"]) == ("gradio", "app.py")
    assert f"gradio=={header['sdk_version']}\n" in (SPACE.parent / "constraints.txt").read_text(encoding="utf-8")


def test_a_table_is_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rich finds Jupyter, it would show the table at once, and leave the text empty."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as its kernel does
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    table = classifier_table({"unsc": method_result(AccDut=0.0, AccDrt=0.5)})
    assert "50 %" in str(table)
    assert "\x1b" not in str(table)
