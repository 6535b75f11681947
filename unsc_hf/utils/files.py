"""Writing files so that no other process sees an incomplete one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(scratch))
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock while this process makes `path`; others that would make it too wait.

    The lock of a process that is killed is released. After an error no lock file is left.
    """
    locks = path.parent / "_locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = locks / f"{path.name}.lock"
    try:
        with FileLock(str(lock)):
            yield
    except BaseException:
        with suppress(OSError):  # in use, or not empty: others work here
            lock.unlink(missing_ok=True)
            for folder in (locks, path.parent):
                folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, completely or not at all."""

    def write(scratch: Path) -> None:
        scratch.write_text(text, encoding="utf-8")

    write_beside(path, write)
