"""The one exception raised for input a user can correct."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UNSCError(ValueError):
    """Bad input: the message names the argument, the value seen and what to do. Recipes print it as one line."""


class UnreadableRowError(UNSCError):
    """A row of a data set holds no image or text; found when the row is read, so it is not known which."""


def closest(name: str, options: Iterable[str], limit: int = 3) -> str:
    """Names among `options` closest to `name` (all of them when there are few), for an error message."""
    options = list(options)
    lowered = {option.lower(): option for option in options}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.4)]
    listed = near or options[:20]
    return ", ".join(repr(option) for option in listed)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; `datasets` tells the reason only in the cause."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    if "column names don't match" in str(error):
        return "the columns of its files differ"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _no_room(error: BaseException | None) -> bool:
    """Whether an error, or one below it, is a full disk; libraries in Rust tell it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and int(found.group(1)) in _NO_ROOM:
            return True
        if isinstance(error, RuntimeError) and re.search(
            "unexpected pos|iostream error|PytorchStreamWriter", str(error)
        ):
            return True  # torch.save
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def full_disk_in_one_line() -> Iterator[None]:
    """A full disk is told like bad input, from whatever library it comes.

    Raises:
        UNSCError: no room was left; what is whole on the disk stays so.
    """
    try:
        yield
    except Exception as error:
        if _no_room(error):
            raise UNSCError(
                f"output_dir: no room is left on the disk ({first_line(error)}); make some, and start the same command again: what is whole is used."
            ) from error
        raise
