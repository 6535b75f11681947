"""The command `unsc`: help, exit codes, JSON; what the commands do is tested with the code they call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.results import run_results

import unsc_hf
from unsc_hf.cli.main import COMMANDS, main


def test_help_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"unsc {name}" in shown for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["unlern"], "'unlern' is no command; closest: 'unlearn'"),
        (["unlearn"], "expected image, text, lm after the command, got nothing"),
        (["compare", "lm"], "expected image, text after the command, got 'lm'"),
        (["audit", "image"], "audited: not given"),
        (["compare", "image", "--methods", "unsk"], "methods: 'unsk' does not exist; closest: 'unsc'"),
        (["ablate", "image", "--studies", "ranks"], "studies: 'ranks' does not exist; closest: 'rank'"),
        (["report", "nowhere"], "folder: nowhere holds no results.json"),
        (["push", "nowhere", "--hub_model_id", "user/x"], "folder: nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert said in seen.err
    assert seen.err.count("\n") == 1
    assert main([*words, "--json"]) == 2
    assert said in json.loads(capsys.readouterr().out)["error"]
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(run_results()))
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "report.html")}
    assert "Shirt" in (tmp_path / "report.html").read_text()
    (tmp_path / "results.json").write_text('{"request": 1}')
    assert main(["report", str(tmp_path)]) == 2


def test_the_installed_command_runs() -> None:
    command = [str(Path(sys.executable).with_name("unsc")), "--help"]
    assert "unsc push" in subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_importing_the_package_and_showing_help_need_no_torch() -> None:
    code = (
        "import sys, unsc_hf; from unsc_hf.cli.main import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("name", unsc_hf.__all__)
def test_every_public_name_is_found_when_it_is_asked_for(name: str) -> None:
    assert getattr(unsc_hf, name) is not None
    assert name in dir(unsc_hf)


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        _ = unsc_hf.unlern


@pytest.mark.parametrize("command", ["unlearn", "compare", "ablate", "audit"])
def test_help_before_the_kind_is_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"unsc {command}" in capsys.readouterr().out
