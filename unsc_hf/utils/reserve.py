"""An output folder that belongs to one run at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UNSCError, first_line
from .distributed import process

LOCK = ".lock"  # stays in the folder: a lock that is removed could be held twice
HOLDER = ".holder"  # names the run that holds the lock


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse an output folder that cannot be made or written, before any work.

    Raises:
        UNSCError: names what is in the way.
    """
    place = Path(folder).absolute()
    there = next(path for path in (place, *place.parents) if os.path.exists(path))
    if not there.is_dir():
        raise UNSCError(f"output_dir: {folder} cannot be made, {there} is a file; choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UNSCError(f"output_dir: {folder} cannot be written, {there} is read-only; choose another folder.")


@contextmanager
def reserved(folder: str | Path) -> Iterator[None]:
    """Keep an output folder for this run. A lock of a process that is killed is released; an empty folder is removed.

    Raises:
        UNSCError: a folder that cannot be written, or that another run holds, which is named.
    """
    check_writable(folder)
    if process()[0] > 0:  # the first process holds it for all
        yield
        return
    place = Path(folder).absolute()
    made = [path for path in (place, *place.parents) if not path.exists()]
    lock, holder = FileLock(str(place / LOCK)), place / HOLDER
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
    except Timeout:
        named = holder.read_text() if holder.is_file() else "it has just begun"
        raise UNSCError(
            f"output_dir: another run writes into {folder} ({named}); wait for its end, or choose another folder."
        ) from None
    except OSError as error:
        raise UNSCError(
            f"output_dir: {folder} cannot be written ({first_line(error)}); choose another folder."
        ) from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        empty = [path.name for path in place.iterdir()] == [LOCK]
        lock.release()  # first: some systems do not delete files that are open
        with suppress(OSError):  # not empty
            if made and empty:
                (place / LOCK).unlink()
            for path in made:
                path.rmdir()
