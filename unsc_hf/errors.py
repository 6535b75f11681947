"""The one exception raised for input a user can correct."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UNSCError(ValueError):
    """Bad input. The message is one line that names the argument, the value seen and what to do."""


class UnreadableRowError(UNSCError):
    """A row holds no image or text that can be read. It is noticed while a batch is read, so its number is unknown."""


def closest(name: str, options: Iterable[str]) -> str:
    """Names among `options` closest to `name` (all of them when there are few), for an error message."""
    options = list(options)
    lowered = {option.lower(): option for option in options}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.4)]
    return ", ".join(repr(option) for option in near or options[:20])


def first_line(error: BaseException) -> str:
    """First line of another library's error message. `datasets` gives the reason only in the cause."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    if "column names don't match" in str(error):
        return "the columns of its files differ"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is a full disk. Libraries in Rust only mention the number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number and int(number.group(1)) in _DISK_FULL:
            return True
        if isinstance(error, RuntimeError) and re.search(
            "unexpected pos|iostream error|PytorchStreamWriter", str(error)
        ):
            return True  # torch.save
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def full_disk_in_one_line() -> Iterator[None]:
    """Report a full disk as a UNSCError, whichever library raised the error. Files that were complete stay complete."""
    try:
        yield
    except Exception as error:
        if _disk_full(error):
            raise UNSCError(
                f"output_dir: no space is left on the disk ({first_line(error)}); free some and start the same command "
                "again, which uses what is complete."
            ) from error
        raise
