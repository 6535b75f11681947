"""Command-line arguments: dataclasses, a YAML file of defaults, and errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ..errors import UNSCError, closest, full_disk_in_one_line


def parse_arguments(
    types: Sequence[Any],
    arguments: Sequence[str] | None = None,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass in `types`, from the command line, then from `--config file.yaml`, then
    `defaults`.

    Raises:
        UNSCError: unreadable file, or a key that is no option (the closest are listed).
        SystemExit: argparse's own, for unknown options and `--help`.
    """
    from transformers import HfArgumentParser

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(list(types), description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins over it.")
    parser.set_defaults(**(defaults or {}))
    optional = {name for cls in types for name, kind in get_type_hints(cls).items() if type(None) in get_args(kind)}
    for action in parser._actions:
        if action.dest in optional and action.type in (int, float):
            action.type = partial(_number_or_none, action.type)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(arguments)[0].config
    if file is not None:
        options = _read_yaml(file)
        known = {f.name for cls in types for f in dataclasses.fields(cls) if f.init}
        if unknown := [key for key in options if key not in known]:
            near = closest(unknown[0], known)
            raise UNSCError(f"config: {file.name} sets {unknown[0]!r}, which is no option; closest: {near}.")
        for action in parser._actions:
            if action.dest not in options:
                continue
            action.required = False
            value = options[action.dest]
            if action.nargs in ("+", "*") and value is not None:  # one name is a list of one
                items = value if isinstance(value, list) else [value]
                options[action.dest] = [action.type(item) if callable(action.type) else item for item in items]
        parser.set_defaults(**options)
    namespace = vars(parser.parse_args(arguments))
    return tuple(cls(**{f.name: namespace[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in types)


def _number_or_none(kind: Callable[[str], float], text: str) -> float | None:
    """A number, or the word None for options that may be switched off, such as `--max_leak None`."""
    return None if text == "None" else kind(text)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UNSCError(f"config: cannot read {file}: {str(error).splitlines()[0]}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UNSCError(f"config: {file} holds a {type(options).__name__}, expected `option: value` lines.")
    return {str(key).lstrip("-").replace("-", "_"): value for key, value in options.items()}


def fill_output_dir(config: Any, base: str) -> None:
    """Where no folder was given, take one that holds no finished run: `outputs/base`, `outputs/base-2`, ..."""
    if config.output_dir != "trainer_output":  # what transformers fills in
        return
    folder, number = Path("outputs", base), 2
    while (folder / "results.json").exists():
        folder, number = Path("outputs", f"{base}-{number}"), number + 1
    config.output_dir = str(folder)


def run_recipe(main: Callable[[], Any]) -> None:
    """Run a script; what a user can correct is printed as one line on standard error, with exit code 2."""
    try:
        with full_disk_in_one_line():
            main()
    except UNSCError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
