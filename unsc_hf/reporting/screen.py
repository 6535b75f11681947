"""What a person sees of a job: one line for each phase. Everything else goes into a log file in the job's folder."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from tqdm import tqdm

from ..errors import UNSCError
from ..utils.phases import PHASES

LOG = "unsc.log"

_CURSOR = re.compile(r"\r|\x1b\[A")  # what progress bars write to go back in a line


class _Log(io.TextIOBase):
    """A text file that is opened late: until then the text waits. Lines of blanks, as progress bars leave them, go.

    A full disk ends no job here: it will when something is written that matters.
    """

    def __init__(self) -> None:
        self.waiting = io.BytesIO()
        self._file: io.RawIOBase | io.BytesIO = self.waiting
        self._line_is_empty = True

    def write(self, text: str) -> int:
        shown = _CURSOR.sub("", text)
        if shown.strip() or shown == " " or (shown.endswith("\n") and not self._line_is_empty):
            with contextlib.suppress(OSError):
                self._file.write(shown.encode("utf-8", "replace"))
            self._line_is_empty = shown.endswith("\n")
        return len(text)

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[None]:
        with path.open("ab", buffering=0) as self._file:
            with contextlib.suppress(OSError):
                self._file.write(self.waiting.getvalue())
            try:
                yield
            except Exception:
                traceback.print_exc(file=self)
                raise
            finally:
                self._file = self.waiting = io.BytesIO()


class Screen(logging.Handler):
    """Shows phases, warnings of this package and results; only the first of several processes shows anything.

    While it is entered, whatever libraries print, log or draw goes into `LOG`, once `log_into` has said where. On a
    terminal the current phase has a bar, which follows the library's own bars.

    Args:
        console: where it is shown; standard output by default.
        bars: whether the current phase is drawn on a terminal; other consoles get plain lines.
    """

    def __init__(self, console: Console | None = None, bars: bool = True) -> None:
        super().__init__(logging.INFO)
        self.first = os.environ.get("RANK", "0") == "0"
        self.console = Console(quiet=True) if not self.first else console or Console(file=sys.stdout)
        self._log = _Log()
        self._to_log = logging.StreamHandler(self._log)
        self._to_log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._live = bars and self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description:<45}"), BarColumn(16), TextColumn("{task.fields[count]:>9}"),
            TimeElapsedColumn(), console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False,
            refresh_per_second=4, disable=not self._live,
        )  # fmt: skip
        self._bar: TaskID | None = None
        self._title, self._began = "", 0.0
        self._said: set[str] = set()
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Screen:
        enter = self._entered.enter_context
        terminal = (sys.stdout, sys.stderr)
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", ())):
            if vars(handler).get("stream") in terminal:
                self._entered.callback(handler.setStream, handler.stream)
                handler.setStream(self._log)
        package = logging.getLogger("unsc_hf")
        for logger, handler in ((logging.root, self._to_log), (package, self)):
            logger.addHandler(handler)
            self._entered.callback(logger.removeHandler, handler)
        self._entered.callback(package.setLevel, package.level)
        package.setLevel(logging.INFO)
        enter(contextlib.redirect_stdout(self._log))
        enter(contextlib.redirect_stderr(self._log))
        self._entered.callback(setattr, tqdm, "display", tqdm.display)
        tqdm.display = lambda bar, *given, **named: self._follow(bar, *given, **named)
        enter(self._progress)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._end_phase(completed=error is None)
        self._entered.close()
        if isinstance(error, Exception) and not isinstance(error, UNSCError):
            sys.stderr.write(self._log.waiting.getvalue().decode())  # a fault of this package: nothing may be lost

    def log_into(self, folder: str | Path) -> contextlib.AbstractContextManager[None]:
        """Keep the log in this folder, which exists; an earlier log is continued."""
        return self._log.opened(Path(folder, LOG)) if self.first else contextlib.nullcontext()

    def emit(self, record: logging.LogRecord) -> None:
        """A phase begins, or this package warns."""
        if record.name == PHASES.name:
            self._end_phase()
            self._title, self._began = record.getMessage(), time.monotonic()
            self._bar = self._progress.add_task(self._title, total=None, count="")
            if not self._live:
                self.console.print(f"{self._title} ...", markup=False, highlight=False, emoji=False)
        elif record.levelno >= logging.WARNING and record.getMessage() not in self._said:
            self._said.add(record.getMessage())  # controls say the same once more
            self.console.print(f"Note: {record.getMessage()}", markup=False, highlight=False, emoji=False)

    def _end_phase(self, completed: bool = True) -> None:
        if self._bar is None:
            return
        self._progress.remove_task(self._bar)
        self._bar = None
        if self._live:
            seconds = f"{time.monotonic() - self._began:.0f} s" if completed else "stopped"
            self.console.print(f"{self._title:<48} {seconds:>8}", markup=False, highlight=False, emoji=False)

    def _follow(self, bar: tqdm[Any], msg: str | None = None, pos: int | None = None) -> bool:
        """What a library's progress bar does in place of drawing itself."""
        if self._bar is not None and not bar.pos and msg is None:  # the outermost one
            count = f"{bar.n}/{bar.total}" if bar.total else ""
            self._progress.update(self._bar, completed=bar.n, total=bar.total, count=count)
        return True
