"""Sizes of memory as people write them."""

from __future__ import annotations

import math

from accelerate.utils import convert_file_size_to_int

from ..errors import UNSCError

_UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3}


def size_in_bytes(size: str | int | None, argument: str) -> int | None:
    """Bytes of a size such as "2GB" or 2000000000, None for None; a UNSCError names `argument` where it is no such
    size."""
    if size is None:
        return None
    try:
        # Upper case: accelerate reads a small "b" as bits.
        count = convert_file_size_to_int(size if isinstance(size, int) else size.upper().strip())
    except (ValueError, OverflowError, AttributeError):
        count = 0
    if isinstance(size, bool) or count < 1:
        raise UNSCError(f'{argument}: {size!r} is not a size; give a number and a unit, such as "2GB" or "500MiB".')
    return int(count)


def format_size(size: int) -> str:
    """Bytes with a unit of thousands, rounded up: a need that is named must be enough when it is granted."""
    for unit, count in _UNITS.items():
        if size >= count:
            hundredths = math.ceil(100 * size / count)
            hundredths += int(hundredths / 100 * count) < size  # where reading the number back would round it down
            return f"{hundredths / 100:.12g}{unit}"
    return f"{size}B"
