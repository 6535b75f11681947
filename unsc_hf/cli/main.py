"""The command `unsc`: unlearn, evaluate, compare, ablate, audit, push and report.

    unsc unlearn image                                  the embedded quickstart: handwritten digits without the 8
    unsc unlearn image --model_name_or_path user/vit --dataset_name user/fashion --forget_classes Shirt --output_dir out
    unsc unlearn text  ...                              a text classifier
    unsc unlearn lm    ...                              a language model
    unsc audit image   --audited user/unlearned --originals user/vit --dataset_name user/fashion \\
                       --forget_classes Shirt --retrained_model_name_or_path user/without-0 --output_dir audit
    unsc evaluate lm   --model_name_or_path user/unlearned --dataset_name locuslab/TOFU --forget_config forget10 \\
                       --retain_config retain90 --unseen_config holdout10 --output_dir evaluation
    unsc compare image --methods unsc scrub ssd --output_dir compare
    unsc ablate image  --studies rank --output_dir studies
    unsc push out --hub_model_id user/vit-without-shirt --hub_private_repo
    unsc report out                                     make out/report.html again from out/results.json

`unsc unlearn image --help` and so on list all options. `--json` prints the result as JSON on standard output, and
everything else on standard error. Exit code 0: done; 2: bad input, in one line; 1: anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UNSCError, closest, full_disk_in_one_line
from .arguments import fill_output_dir, parse_arguments

_QUIET = {"disable_tqdm": True, "report_to": "none"}
_LANGUAGE_DEFAULTS = {"per_device_train_batch_size": 32}


@dataclass
class AuditedArguments:
    """Which model is audited."""

    audited: str | None = field(
        default=None, metadata={"help": "The unlearned model, made by anybody: a Hub id or folder."}
    )


def _check_kind(words: Sequence[str], kinds: Sequence[str]) -> None:
    """Refuse a first word that is not among `kinds`; `--help` in its place shows all commands."""
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if not words or words[0] not in kinds:
        seen = f"{words[0]!r}" if words else "nothing"
        raise UNSCError(f"unsc: expected {', '.join(kinds)} after the command, got {seen}.")


def _parse(words: Sequence[str], *more: type, kinds: Sequence[str] = ("image", "text")) -> tuple[Any, ...]:
    """Arguments of the types `more`, those of the kind that the first word names, and the options of unlearning."""
    _check_kind(words, kinds)
    from ..comparison.arguments import ImageArguments, LanguageArguments, TextArguments
    from ..config import UNSCConfig

    types = {"image": ImageArguments, "text": TextArguments, "lm": LanguageArguments}
    defaults = _LANGUAGE_DEFAULTS if words[0] == "lm" else _QUIET if more else None
    return parse_arguments((*more, types[words[0]], UNSCConfig), words[1:], __doc__ or "", defaults)


def unlearn(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc unlearn image|text|lm ...`; the content of results.json."""
    arguments, config = _parse(words, kinds=("image", "text", "lm"))
    kind = "language-model" if words[0] == "lm" else words[0]
    fill_output_dir(config, "quickstart" if arguments.quickstart else f"unlearned-{kind}")
    run = import_module(f"unsc_hf.runs.{'language' if words[0] == 'lm' else 'classification'}").run
    run(arguments, config, console)
    results = json.loads(Path(str(config.output_dir), "results.json").read_text(encoding="utf-8"))
    return {"output_dir": str(config.output_dir), **results}


def evaluate(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc evaluate lm ...`; the summary."""
    _check_kind(words, ("lm",))
    from ..runs.evaluation_arguments import EvaluationArguments
    from ..runs.language_evaluation import run

    (arguments,) = parse_arguments((EvaluationArguments,), words[1:], __doc__ or "")
    return {"output_dir": arguments.output_dir, "summary": run(arguments, console)}


def compare(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc compare image|text ...`; the summaries by forget set."""
    from ..comparison.compare_methods import ComparisonArguments, compare_methods

    comparison, arguments, config = _parse(words, ComparisonArguments)
    fill_output_dir(config, "comparison")
    return _summarise(compare_methods(comparison, arguments, config, console), config, console)


def audit(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc audit image|text ...`; the summaries by forget set."""
    from ..comparison.compare_methods import ComparisonArguments, compare_methods

    audited, comparison, arguments, config = _parse(words, AuditedArguments, ComparisonArguments)
    if audited.audited is None:
        raise UNSCError("audited: not given; name the unlearned model, by its Hub id or folder.")
    fill_output_dir(config, "audit")
    result = compare_methods(comparison, arguments, config, console, audited=audited.audited)
    return _summarise(result, config, console)


def _summarise(result: dict[str, Any], config: Any, console: Console) -> dict[str, Any]:
    """Write and print what a comparison has found."""
    from ..comparison.report import write_comparison
    from ..comparison.summary import markdown, table
    from ..reporting.model_card import typed_command

    summaries = write_comparison(result, Path(str(config.output_dir)), typed_command())
    for name, summary in summaries.items():
        console.print(f"\n{name}\n\n{markdown(table(summary))}", soft_wrap=True, markup=False)
    return {"output_dir": str(config.output_dir), "forget_sets": summaries}


def ablate(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc ablate image|text ...`; the paragraph of each study."""
    from ..comparison.run_studies import AblationArguments, run_studies
    from ..reporting.model_card import typed_command

    ablation, arguments, config = _parse(words, AblationArguments)
    fill_output_dir(config, "studies")
    paragraphs = run_studies(ablation, arguments, config, typed_command(), console)
    return {"output_dir": str(config.output_dir), "studies": paragraphs}


def push(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc push FOLDER --hub_model_id user/name ...`; the commit."""
    from ..reporting.hub import publish

    parser = argparse.ArgumentParser(
        prog="unsc push", description=publish.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", help="output folder of a finished run")
    parser.add_argument("--hub_model_id", required=True, help="user/name")
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--hub_revision", help="branch; made when it is not there")
    parser.add_argument("--hub_token", help="token with the right to write")
    parser.add_argument("--base_model", help="Hub id of an adapter's base model, where its config names a folder")
    options = parser.parse_args(list(words))
    commit = publish(
        options.folder, options.hub_model_id, private=options.hub_private_repo, revision=options.hub_revision,
        token=options.hub_token, base_model=options.base_model,
    )  # fmt: skip
    console.print(f"Published: {commit.commit_url}", markup=False)
    return {"commit": commit.oid, "url": commit.commit_url}


def report(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc report FOLDER`; where the report is."""
    from ..reporting.report import write_run_report

    parser = argparse.ArgumentParser(
        prog="unsc report", description="Make report.html again from a run's results.json."
    )
    parser.add_argument("folder", help="output folder of a finished run")
    folder = Path(parser.parse_args(list(words)).folder)
    file = folder / "results.json"
    if not file.is_file():
        raise UNSCError(f"folder: {folder} holds no results.json; name the output folder of a finished run.")
    try:
        path = write_run_report(json.loads(file.read_text(encoding="utf-8")), folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UNSCError(f"folder: {file} is not what a run writes ({type(error).__name__}: {error}).") from error
    console.print(f"Report: {path}", markup=False)
    return {"report": str(path)}


COMMANDS: dict[str, Callable[[Sequence[str], Console], dict[str, Any]]] = {
    command.__name__: command for command in (unlearn, evaluate, compare, ablate, audit, push, report)
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    console = Console(stderr=as_json)
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            raise UNSCError(f"unsc: {words[0]!r} is no command; closest: {closest(words[0], COMMANDS)}.")
        with full_disk_in_one_line():
            result = COMMANDS[words[0]](words[1:], console)
    except UNSCError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": line}))
        return 2
    if as_json:
        from ..reporting.results import finite

        print(json.dumps(finite(result)))
    return 0


def entry() -> None:
    """What the installed command runs."""
    raise SystemExit(main())
