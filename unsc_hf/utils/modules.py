"""Folders whose modules register something."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence


def import_modules(package: str, path: Iterable[str], first: Sequence[str] = ()) -> None:
    """Import every module of a package: `first` those that register what comes first in tables, then by their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(path))
    for name in dict.fromkeys((*first, *names)):
        importlib.import_module(f"{package}.{name}")
