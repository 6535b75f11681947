"""Every block of Python and every command on the pages runs as printed.

Tiny models stand on a Hub on this machine, and tiny data sets in folders that have the names of those on the pages.
Training is cut to a few steps.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import stand_ins
from helpers.hub_server import TOKEN, Hub, Repo

ROOT = Path(__file__).parents[2]
SHELVES = ("get_started", "how_to", "concepts")
PAGES = ["README.md", "docs/index.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for shelf in SHELVES for path in (ROOT / "docs" / shelf).glob("*.md"))
QUICK = ("README.md", "docs/get_started/install.md", "docs/how_to/protect_any_trainer.md")
_FENCE = re.compile(r"^ *```(\w+)$", re.M)
Run = Callable[[str, str], str | None]


def languages(page: str) -> set[str]:
    return set(_FENCE.findall((ROOT / page).read_text(encoding="utf-8")))


CASES = [
    pytest.param(page, language, marks=() if page in QUICK else pytest.mark.slow, id=f"{page}-{language}")
    for page in PAGES
    for language in ("python", "bash")
    if language in languages(page)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    stand_ins.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def worker(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, str]], str | None]]:
    """Sends a page to the process that runs it; gives the error, or None."""
    hub, home = Hub(), tmp_path_factory.mktemp("home")
    for name, folder in stand_ins.make_models(data, tmp_path_factory.mktemp("models")).items():
        hub.repos[name] = Repo()
        hub.repos[name].commit(stand_ins.files_of(folder))
    with hub.serve() as endpoint, (home / "log").open("w+") as log:
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1,localhost", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        words = [sys.executable, str(ROOT / "tests" / "helpers" / "page_worker.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(words, env=environment, text=True, **pipes)
        asked, answers = process.stdin, process.stdout

        def ask(request: dict[str, str]) -> str | None:
            asked.write(json.dumps(request) + "\n")
            asked.flush()
            line = next((line for line in answers if line.startswith("\x1e")), None)
            assert line is not None, f"the process ended: {log.seek(0) or log.read()[-3000:]}"
            error: str | None = json.loads(line[1:])["error"]
            return error

        yield ask
        asked.close()
        process.wait(20)


@pytest.fixture
def run(worker: Callable[[dict[str, str]], str | None], data: Path, tmp_path: Path) -> Run:
    """Runs the blocks of one language of a page, in a folder that holds the data sets."""

    def run(page: str, language: str) -> str | None:
        shutil.copytree(data, tmp_path, dirs_exist_ok=True)
        return worker({"page": page, "language": language, "folder": str(tmp_path)})

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "language"), CASES)
def test_the_blocks_of_a_page_run(page: str, language: str, run: Run) -> None:
    error = run(page, language)
    assert error is None, error


@pytest.mark.parametrize(
    ("language", "fault", "seen"),
    [
        ("python", "from unsc_hf import unlearn_all", "unlearn_all"),
        ("python", "from unsc_hf import UNSCConfig\nUNSCConfig(output_dir='x', enrgy=0.9)", "enrgy"),
        ("bash", "unsc unlearn image --forget_class 8 --output_dir x", "exit code|SystemExit"),
        ("bash", "unsc unlaern image", "exit code 2"),
        ("bash", "accelerate launch recipes/unlearn_all.py", "unlearn_all"),
        ("bash", "make everything", "everything"),
    ],
)  # fmt: skip
def test_a_broken_block_fails(language: str, fault: str, seen: str, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```{language}\n{fault}\n```\n")
    error = run(str(page), language)
    assert error is not None
    assert re.search(seen, error)


def test_the_quickstart_shows_the_figures_of_the_committed_card() -> None:
    page = (ROOT / "docs/get_started/quickstart.md").read_text(encoding="utf-8")
    card = (ROOT / "model_cards/digits-without-8/README.md").read_text(encoding="utf-8").replace("**", "")
    (_, table) = page.split("─" * 75 + "\n")
    shown = [re.split(r" {2,}", line) for line in table.split("\n```")[0].splitlines()]
    assert len(shown) == 5
    for cells in shown:
        assert "| " + " | ".join(cells) in card
    (counted,) = re.findall(r"^(\d+ of \d+) decisions changed", page, re.M)
    assert f"Decisions changed on {counted} inputs that the original never saw" in card
