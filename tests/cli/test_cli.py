"""The command `unsc`: help, JSON, doctor, completion; what the commands do is tested with the code they call."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
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


def test_a_report_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(run_results()))
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "report.html")}
    assert "Shirt" in (tmp_path / "report.html").read_text()
    (tmp_path / "results.json").write_text('{"request": 1}')
    assert main(["report", str(tmp_path)]) == 2


@pytest.mark.parametrize("kind", ["image", "text", "lm"])
def test_help_is_a_screen_and_a_half_in_groups(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main(["unlearn", kind, option])
    everything = capsys.readouterr().out
    short = everything.split("--help-all shows all options")[0]
    lines = short.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80
    for title, option in (("Request", "forget"), ("Model and data", "dataset_name"), ("Method", "energy")):
        assert f"--{option}" in short.split(f"{title}:")[1].split(":\n")[0]
    assert "--output_dir" in short.split("Output:")[1]
    assert "adam_beta1" not in short
    assert "--adam_beta1" in everything


def test_help_shows_first_what_belongs_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "image", "--help"])
    assert "--methods" in capsys.readouterr().out.split("This command:")[1].split("Request:")[0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unsc_hf {unsc_hf.__version__}\n"


def test_doctor_is_one_screen_and_shows_no_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "s" * 34
    for given, said in ((token, "set"), ("", "not set; `hf auth login`")):
        monkeypatch.setenv("HF_TOKEN", given)
        monkeypatch.setattr("huggingface_hub.get_token", lambda given=given: given or None)
        assert main(["doctor"]) == 0
        shown = capsys.readouterr().out
        assert token not in shown
        assert len(shown.splitlines()) < 24
        found = {line[:18].strip(): line[18:].strip() for line in shown.splitlines()}
        assert found["Hub token"].startswith(said)
        assert found["torch"] == metadata.version("torch")
        assert {"python", "transformers", "peft", "datasets", "device", "cache folder"} <= set(found)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("unsc unl", {"unlearn"}),
        ("unsc audit ", {"image", "text", "lm"}),
        ("unsc unlearn image --forget_c", {"--forget_classes", "--forget_column"}),
        ("unsc evaluate lm --retain_l", {"--retain_logs"}),
        ("unsc compare image --meth", {"--methods"}),
        ("unsc unlearn image --config opt", {"options.yaml"}),
        ("unsc report o", {"options.yaml"}),
    ],
)
def test_the_shell_completes(typed: str, offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").touch()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    last = "''" if typed.endswith(" ") else ""
    ask = f"COMP_WORDS=({typed}{last}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _unsc"
    code = f'{script}\n{ask}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.split()) == offered
    assert done.stderr == ""


def test_zsh_takes_the_same_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -Uz bashcompinit")


def test_the_keyboard_stops_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "doctor", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


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
