"""Runs the blocks of one page after another, in a process of its own: the client reads `HF_ENDPOINT` when imported.

Reads one request a line, and answers with one line of JSON. Training is cut to a few steps, and commands leave out the
controls; nothing else differs from what a reader would run.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import tomllib
from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments

from unsc_hf.cli.main import main as unsc

ROOT = Path(__file__).parents[2]
STEPS = 4
# Options that are added to a command, so that it takes less time.
QUICKER = {"unlearn": ["--use_cpu", "--no_controls"], "audit": ["--use_cpu"], "compare": ["--use_cpu"]}
_INDENTED = re.compile(r"^(?P<indent> *)```(?P<language>python|bash)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)


def blocks_of(page: str, language: str) -> list[tuple[int, str]]:
    """First line number and code of each block of a language on a page."""
    found = (match for match in _INDENTED.finditer(page) if match["language"] == language)
    return [(page.count("\n", 0, match.start()) + 2, match["code"]) for match in found]


def shorten_training() -> None:
    """No trainer of this process runs more than `STEPS` steps."""
    checked = TrainingArguments.__post_init__

    def quick(self: TrainingArguments) -> None:
        checked(self)
        self.max_steps = min(self.max_steps, STEPS) if self.max_steps > 0 else STEPS

    TrainingArguments.__post_init__ = quick  # type: ignore[method-assign]


def run_python(name: str, blocks: list[tuple[int, str]]) -> None:
    """All blocks in one namespace; errors name the line of the page."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)


def run_script(words: list[str]) -> None:
    """A script of the repository; its exit code must be 0."""
    before, code = sys.argv, None
    sys.argv = words
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = before
    assert not code, f"exit code {code}"


def run_unsc(words: list[str]) -> None:
    if words[0] == "app":  # its page is closed at once
        import gradio

        gradio.Blocks.block_thread = gradio.Blocks.close
    code = unsc([*words, *QUICKER.get(words[0], [])])
    assert code == 0, f"exit code {code}"


def run_accelerate(words: list[str]) -> None:
    """`accelerate launch`: its own options are parsed, and the script runs in this process."""
    assert words[0] == "launch", words
    options = launch_command_parser().parse_args(words[1:])
    assert options.config_file is None or (ROOT / options.config_file).is_file(), options.config_file
    run_script([options.training_script, *options.training_script_args, *QUICKER["unlearn"]])


def check_pip(words: list[str]) -> None:
    """Only this project is installed, with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    match = re.fullmatch(r"\.(?:\[(\w+)\])?", words[1])
    assert words[0] == "install", words
    assert match is not None, words
    assert match[1] in (None, *extras), words


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        assert re.search(rf"^{word}:", text, re.M), f"the Makefile has no target {word!r}"


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "unsc": run_unsc, "accelerate": run_accelerate, "pip": check_pip, "make": check_make,
}  # fmt: skip


def run_bash(name: str, blocks: list[tuple[int, str]]) -> None:
    """Every command of the blocks."""
    for line, code in blocks:
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if not words:
                continue
            try:
                assert words[0] in COMMANDS, f"no test knows the command {words[0]!r}"
                COMMANDS[words[0]](words[1:])
            except BaseException as error:
                raise RuntimeError(f"{name}, block at line {line}: {' '.join(words)}") from error


def main() -> None:
    shorten_training()
    runners = {"python": run_python, "bash": run_bash}
    for request in map(json.loads, sys.stdin):
        os.chdir(request["folder"])
        page = (ROOT / request["page"]).read_text(encoding="utf-8")
        answer: dict[str, Any] = {"error": None}
        try:
            with redirect_stdout(sys.stderr):
                runners[request["language"]](request["page"], blocks_of(page, request["language"]))
        except BaseException:  # also SystemExit of argparse
            answer["error"] = traceback.format_exc()
        print("\x1e" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
