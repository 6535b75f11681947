"""A screen shows phases and warnings of this package; what libraries say is in the log, whole and in order."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tqdm import tqdm

from unsc_hf.errors import UNSCError
from unsc_hf.reporting.screen import LOG, Screen
from unsc_hf.utils.phases import phase


def chatter(library: logging.Logger) -> None:
    """What libraries do to a terminal."""
    print("printed by a library")
    print("complained by a library", file=sys.stderr)
    library.warning("logged by a library")
    for _ in tqdm(range(50), desc="drawn by a library", mininterval=0):
        pass


@pytest.fixture
def library(capsys: pytest.CaptureFixture[str]) -> logging.Logger:
    logger = logging.getLogger("some_library")
    logger.propagate = False
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    return logger


@pytest.mark.parametrize("terminal", [False, True])
def test_chatter_goes_into_the_log(
    terminal: bool, library: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    before = (sys.stdout, sys.stderr, tqdm.display, library.handlers[0].stream)
    with Screen(Console(file=shown, force_terminal=terminal, width=100, color_system=None)) as screen:
        print("before there is a folder")
        with screen.log_into(tmp_path):
            phase("First")
            chatter(library)
            phase("Second")
            logging.getLogger("unsc_hf.somewhere").info("A detail.")
            for _ in range(2):
                logging.getLogger("unsc_hf.somewhere").warning("Of ours.")
    assert (sys.stdout, sys.stderr, tqdm.display, library.handlers[0].stream) == before
    assert logging.getLogger("unsc_hf").level == logging.NOTSET
    log, text = (tmp_path / LOG).read_text(), shown.getvalue()
    said = [
        "before there is a folder",
        "First",
        *(f"{how} by a library" for how in ("printed", "complained", "logged")),
    ]
    places = [log.index(words) for words in [*said, "Second", "A detail.", "Of ours."]]
    assert places == sorted(places)
    assert "drawn" not in log
    assert "library" not in text
    assert "A detail." not in text
    assert "\n\n" not in log
    assert text.count("Note: Of ours.") == 1
    assert ("First ..." in text) != terminal
    assert terminal == bool(re.search(r"First +\d+ s", text))
    assert capsys.readouterr() == ("", "")


def test_the_current_phase_follows_the_bars_of_libraries() -> None:
    shown = io.StringIO()
    with Screen(Console(file=shown, force_terminal=True, width=100, color_system=None)):
        phase("Training")
        for step in tqdm(range(10), mininterval=0):
            if step == 7:
                time.sleep(0.6)  # the screen draws four times a second
    assert "7/10" in shown.getvalue()


def test_only_the_first_process_shows_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    shown = io.StringIO()
    with Screen(Console(file=shown)) as screen, screen.log_into(tmp_path):
        phase("First")
        print("printed")
    assert shown.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refused", [False, True])
def test_a_fault_leaves_its_traceback_in_the_log(
    refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with Screen(Console(file=io.StringIO())) as screen:
            print("before the folder")
            if refused:
                raise UNSCError("x: refused.")
            with screen.log_into(tmp_path):
                raise ZeroDivisionError

    with pytest.raises(UNSCError if refused else ZeroDivisionError):
        fail()
    assert capsys.readouterr() == ("", "")
    if not refused:
        assert "ZeroDivisionError" in (tmp_path / LOG).read_text()


def test_what_was_said_before_a_fault_without_a_log_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        print("the reason")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Screen(Console(file=io.StringIO())):
        fail()
    assert capsys.readouterr().err == "the reason\n"


def test_a_second_run_continues_the_log(tmp_path: Path) -> None:
    for word in ("one", "two"):
        with Screen(Console(file=io.StringIO())) as screen, screen.log_into(tmp_path):
            print(word)
    assert (tmp_path / LOG).read_text() == "one\ntwo\n"
