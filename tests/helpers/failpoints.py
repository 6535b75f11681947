"""Stops a run at its n-th write, rename or removal, as a kill does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Killed(BaseException):
    """Nothing in the package may catch this."""


class _Failpoint:
    """Counts what happens to the disk below `folder`, and stops the process at event `at`, before it happens."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.at, self.events = -1, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        if not isinstance(arguments[0], (str, Path)) or not str(arguments[0]).startswith(str(self.folder)):
            return
        self.events += 1
        if self.events > self.at >= 0:  # a killed process does nothing more, not even tidy up
            raise Killed


_failpoint: _Failpoint | None = None


@contextmanager
def stopped_at(event: int, folder: Path) -> Iterator[_Failpoint]:
    """From event number `event` (from 0) on, nothing more is changed below `folder`; -1 only counts."""
    global _failpoint
    if _failpoint is None:  # an audit hook cannot be taken away again
        _failpoint = _Failpoint()
        sys.addaudithook(_failpoint)
    _failpoint.folder, _failpoint.at, _failpoint.events = folder, event, 0
    try:
        yield _failpoint
    finally:
        _failpoint.folder = None
