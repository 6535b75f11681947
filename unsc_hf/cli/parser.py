"""Options: dataclasses as a parser, a YAML file of defaults, help in groups, and every mistake in one line."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import UNSCError, closest, first_line

# What `--help` shows of the options that all commands share; `--help-all` shows the rest.
_GROUPS = {
    "Request": "forget_classes forget_indices forget_column forget_values forget_split retain_split forget_config "
    "retain_config unseen_config",
    "Model and data": "model_name_or_path dataset_name retrained_model_name_or_path train_original train_retrained "
    "model_size label_column text_columns",
    "Method": "objective objectives energy max_leak max_flips target_forget_accuracy learning_rate max_steps "
    "use_peft controls use_cpu seed",
    "Output": "output_dir references_dir push_to_hub hub_model_id resume_from_checkpoint disable_tqdm config",
}

# Where transformers' own words are long, or say something else than what happens here.
_WORDS = {
    "output_dir": "Folder for model, card, report and log",
    "learning_rate": "Learning rate at the first step",
    "max_steps": "Most optimiser steps",
    "use_cpu": "Do not use an accelerator",
    "seed": "Random seed",
    "push_to_hub": "Publish when everything is written",
    "hub_model_id": "Where to: user/name",
    "resume_from_checkpoint": "true: go on from the last checkpoint",
    "disable_tqdm": "Show no progress bars",
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the closest option."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise a UNSCError in place of printing the usage."""
        option, value, said = _parts(message)
        action = next((action for action in self._actions if f"--{option}" in action.option_strings), None)
        if action is None:
            raise UNSCError(f"{self.prog}: {message}.")
        if value is None:
            reason = "no value given; write one after it" if said.startswith("expected") else said.rstrip(". ")
            raise UNSCError(f"{option}: {reason}.")
        if action.choices is not None:
            raise UNSCError(f"{option}: got {value}; closest: {closest(value, map(str, action.choices))}.")
        kind: Any = action.type.args[0] if isinstance(action.type, partial) else action.type
        expected = {int: "a whole number", float: "a number"}
        raise UNSCError(f"{option}: got {value}, expected {expected.get(kind, 'another value')}.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; an option that does not exist is a UNSCError with the closest one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((word for word in unknown if word.startswith("-")), None)
            if name is None:
                raise UNSCError(f"unsc: {unknown[0]!r} was not expected; options begin with --.")
            near = closest(name, self.option_names())
            raise UNSCError(f"{name.split('=')[0]}: there is no such option; closest: {near}.")
        return parsed

    def option_names(self) -> list[str]:
        """All options, as people type them: with underscores."""
        return [text for action in self._actions for text in action.option_strings if re.match(r"--\w+$", text)]


def _parts(message: str) -> tuple[str, str | None, str]:
    """Name of the option that argparse complains of, the value it quotes, and what it says."""
    found = re.match(r"argument -?-?([\w-]+)[^:]*: (.*)", message)
    option, said = found.groups() if found else ("", message)
    value = re.match(r"invalid .*?: ('.*?'|\".*?\")(?: \(|$)", said)
    return option.replace("-", "_"), value.group(1) if value else None, said


class OptionsParser(OneLineParser, HfArgumentParser):
    """The options of some dataclasses, as `HfArgumentParser` makes them.

    Options that hold a number or None are switched off by the word None, as in `--max_leak None`.
    """

    def __init__(self, types: Sequence[Any], prog: str = "unsc", own: Sequence[str] = ()) -> None:
        """`own` are names of options that belong to this command alone; help shows them first."""
        super().__init__(list(types), prog=prog)
        self.own = own
        self.add_argument("--config", help="YAML file with any of these options; the command line wins over it.")
        self.add_argument("--help-all", action="store_true", help="show all options, also those of TrainingArguments")
        optional = {name for cls in types for name, kind in get_type_hints(cls).items() if type(None) in get_args(kind)}
        for action in self._actions:
            if action.dest in optional and action.type in (int, float):
                action.type = partial(_number_or_none, action.type)

    def print_help(self, file: Any = None) -> None:
        """The options of everyday, in groups."""
        width, actions = shutil.get_terminal_size().columns, {action.dest: action for action in reversed(self._actions)}
        common = {title: [name for name in names.split() if name not in self.own] for title, names in _GROUPS.items()}
        groups = {**({"This command": self.own} if self.own else {}), **common}
        lines = [f"usage: {self.prog} [--option value ...]"]
        for title, names in groups.items():
            shown = [actions[name] for name in names if name in actions]
            lines += ["", f"{title}:"] if shown else []
            for action in shown:
                first = _WORDS.get(action.dest) or re.split(r"(?<=[^.])[.;] ", f"{action.help} ", maxsplit=1)[0]
                default = _shown(action.default, action.dest)
                lines += textwrap.wrap(
                    f"--{action.dest:<30} {first}{default}", width, initial_indent="  ", subsequent_indent=" " * 35
                )
        lines += ["", "--help-all shows all options, also those of transformers' TrainingArguments."]
        print("\n".join(lines), file=file)

    def parse(self, words: Sequence[str], defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """One instance of each dataclass, from the words, then from `--config file.yaml`, then from `defaults`.

        Raises:
            UNSCError: an option, a value or a file that cannot be.
            SystemExit: after help was shown.
        """
        self.set_defaults(**(defaults or {}))
        if "--help-all" in words:
            super().print_help()
            raise SystemExit(0)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config", type=Path, nargs="?")
        file = first.parse_known_args(list(words))[0].config
        if file is not None:
            self._read(file)
        values = vars(self.parse_args(list(words)))
        try:
            return tuple(
                cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.init})
                for cls in self.dataclass_types
            )
        except UNSCError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # what TrainingArguments refuses
            raise UNSCError(f"options: {first_line(error)}") from error

    def _read(self, file: Path) -> None:
        """Take the options in a YAML file as defaults."""
        options = _read_yaml(file)
        actions = {action.dest: action for action in self._actions}
        if unknown := [key for key in options if key not in actions]:
            near = closest(unknown[0], actions)
            raise UNSCError(f"config: {file.name} sets {unknown[0]!r}, which is no option; closest: {near}.")
        for name, value in options.items():
            action = actions[name]
            action.required = False
            if isinstance(value, list) and action.nargs not in ("+", "*"):
                raise UNSCError(f"config: {file.name} sets {name} to a list, expected one value.")
            if isinstance(value, int | float) and not isinstance(value, bool) and callable(action.type):
                options[name] = str(value)  # so that it is read, and refused, as on the command line
            if action.nargs in ("+", "*") and value is not None:  # one name is a list of one
                items = value if isinstance(value, list) else [value]
                options[name] = [action.type(item) if callable(action.type) else item for item in items]
        self.set_defaults(**options)


def _shown(default: Any, name: str) -> str:
    """A default as help shows it: as one would type it."""
    if default is True:
        return f" (on; --no_{name} switches it off)"
    if default is None or default is False or default == "":
        return ""
    return f" ({' '.join(map(str, default)) if isinstance(default, list) else default})"


def _number_or_none(kind: Callable[[str], float], text: str) -> float | None:
    """A number, or None for the word None."""
    return None if text == "None" else kind(text)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UNSCError(f"config: cannot read {file}: {first_line(error)}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UNSCError(f"config: {file} holds a {type(options).__name__}, expected `option: value` lines.")
    return {str(key).lstrip("-").replace("-", "_"): value for key, value in options.items()}
