"""The one exception raised for input a user can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UNSCError(ValueError):
    """Bad input: the message names the argument, the value seen and what to do. Recipes print it as one line."""


def closest(name: str, options: Iterable[str], limit: int = 3) -> str:
    """Names among `options` closest to `name` (all of them when there are few), for an error message."""
    options = list(options)
    lowered = {option.lower(): option for option in options}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.4)]
    listed = near or options[:20]
    return ", ".join(repr(option) for option in listed)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
