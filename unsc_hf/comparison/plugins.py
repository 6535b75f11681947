"""A user's own files that register methods, audits or studies."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UNSCError, first_line


def load_plugins(files: Sequence[str] | None) -> None:
    """Import Python files; what they register is known by its name from then on. UNSCError where one cannot be."""
    for file in files or ():
        path = Path(file).expanduser()
        if path.suffix != ".py" or not path.is_file():
            raise UNSCError(f"plugins: {file!r} is no Python file; name the .py files that register something.")
        name = f"unsc_hf_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UNSCError(f"plugins: {file!r} cannot be read as Python.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a user's file may raise
            raise UNSCError(
                f"plugins: {file} cannot be imported: {type(error).__name__}: {first_line(error)}"
            ) from error
