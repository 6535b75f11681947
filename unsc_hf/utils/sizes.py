"""Sizes of memory as people write them."""

from __future__ import annotations

import math
import re

from ..errors import UNSCError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


_NUMBER = 8  # bytes of a float64


def parse_size(value: str | int | None, argument: str) -> int | None:
    """Bytes of a size such as "2GB", "1.5 GiB" or 2000000000; None stays None.

    Raises:
        UNSCError: anything else, or a size that is not positive; the message names `argument`.
    """
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", str(value), re.IGNORECASE)
    unit = "" if found is None else found.group(2).upper()
    unit = f"{unit}B" if unit and not unit.endswith("B") else unit.removesuffix("B") if unit == "B" else unit
    if isinstance(value, bool) or found is None or unit not in _UNITS or not float(found.group(1)) * _UNITS[unit] >= 1:
        raise UNSCError(
            f'{argument}: {value!r} is not a size; give bytes, or a number and a unit, such as "2GB" or "500MiB".'
        )
    return round(float(found.group(1)) * _UNITS[unit])


def format_size(size: int) -> str:
    """Bytes with a unit of thousands, rounded up: what is named as needed must do."""
    for unit in ("GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{math.ceil(100 * size / _UNITS[unit]) / 100:.12g}{unit}"
    return f"{size}B"
