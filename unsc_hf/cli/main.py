"""Make models forget by null-space calibration, and look at what is left.

    unsc unlearn image|text|lm    unlearn, compare, and write model, card and report; without options: digits, no 8
    unsc audit image|text|lm      what an unlearned model still shows, whoever made it
    unsc compare image|text       methods beside each other, with the same stopping rule
    unsc ablate image|text        named studies of what the method depends on
    unsc evaluate lm              a language model as TOFU measures it
    unsc report FOLDER            make report.html again
    unsc app FOLDER               a page to try a finished run on
    unsc push FOLDER              publish a finished run on the Hub
    unsc doctor                   versions, device, cache, token, disk
    unsc completion bash|zsh      completion for your shell: eval "$(unsc completion bash)"

For example:

    unsc unlearn image --model_name_or_path user/vit --dataset_name user/data --forget_classes Shirt --output_dir out

`unsc unlearn image --help` shows the options of a command, `--help-all` all of them. `--json` prints the result as JSON
on standard output, and everything else on standard error. `unsc --version` prints the version. Exit code 0: done;
2: bad input, in one line; 1: anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UNSCError, closest, full_disk_in_one_line

KINDS = {
    "unlearn": ("image", "text", "lm"), "audit": ("image", "text", "lm"), "compare": ("image", "text"),
    "ablate": ("image", "text"), "evaluate": ("lm",),
}  # fmt: skip

_QUIET = {"disable_tqdm": True, "report_to": "none"}
_LANGUAGE_DEFAULTS = {"per_device_train_batch_size": 32}

_OWN_MODEL = (
    "Your own  unsc unlearn image --model_name_or_path user/vit --dataset_name user/data --forget_classes Shirt"
)


@dataclass
class AuditedArguments:
    """Which model is audited."""

    audited: str | None = field(
        default=None, metadata={"help": "The unlearned model, made by anybody: a Hub id or folder."}
    )


def options_parser(command: str, kind: str) -> Any:
    """The parser of a command that works on models of a kind."""
    from ..comparison.arguments import ImageArguments, LanguageArguments, TextArguments
    from ..comparison.compare_methods import ComparisonArguments
    from ..comparison.run_studies import AblationArguments
    from ..config import UNSCConfig
    from ..runs.evaluation_arguments import EvaluationArguments
    from .parser import OptionsParser

    own: dict[str, tuple[Any, ...]] = {
        "audit": (AuditedArguments, ComparisonArguments), "compare": (ComparisonArguments,),
        "ablate": (AblationArguments,), "evaluate": (EvaluationArguments,), "unlearn": (),
    }  # fmt: skip
    of_kind = {"image": ImageArguments, "text": TextArguments, "lm": LanguageArguments}[kind]
    shared: tuple[Any, ...] = () if command == "evaluate" else (of_kind, UNSCConfig)
    if (command, kind) == ("audit", "lm"):
        from ..runs.language_audit import LanguageAuditArguments

        own["audit"], shared = (LanguageAuditArguments,), ()
    names = [f.name for cls in own[command] for f in fields(cls)]
    return OptionsParser((*own[command], *shared), f"unsc {command} {kind}", names)


def _parse(command: str, words: Sequence[str], defaults: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """The options of a command; its first word is a kind of model, and `--help` in its place shows all commands."""
    kinds = KINDS[command]
    if words and words[0] in ("-h", "--help", "--help-all"):
        print(__doc__)
        raise SystemExit(0)
    if not words or words[0] not in kinds:
        seen = f"{words[0]!r}" if words else "nothing"
        raise UNSCError(f"unsc: expected {' or '.join(kinds)} after {command}, got {seen}.")
    return tuple(options_parser(command, words[0]).parse(words[1:], defaults))


def fill_output_dir(config: Any, base: str) -> None:
    """Where no folder was given, take one that holds no finished run: `outputs/base`, `outputs/base-2`, ..."""
    if config.output_dir != "trainer_output":  # what transformers fills in
        return
    folder, number = Path("outputs", base), 2
    while (folder / "results.json").exists():
        folder, number = Path("outputs", f"{base}-{number}"), number + 1
    config.output_dir = str(folder)


def _command(name: str, words: Sequence[str]) -> str:
    """The command for cards and reports."""
    from ..reporting.model_card import scrubbed_command

    return scrubbed_command(["unsc", name, *words])


def unlearn(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc unlearn image|text|lm ...`; the content of results.json."""
    language = bool(words) and words[0] == "lm"
    arguments, config = _parse("unlearn", words, _LANGUAGE_DEFAULTS if language else None)
    from ..reporting.screen import LOG, Screen
    from ..reporting.summary import print_summary

    kind = "language-model" if language else words[0]
    fill_output_dir(config, "quickstart" if arguments.quickstart else f"unlearned-{kind}")
    run = import_module(f"unsc_hf.runs.{'language' if language else 'classification'}").run
    folder = Path(str(config.output_dir))
    with Screen(console, bars=not config.disable_tqdm) as screen:
        run(arguments, config, screen, _command("unlearn", words))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    more = [f"Log       {folder / LOG}", *([_OWN_MODEL] if arguments.quickstart else [])]
    print_summary(results, folder, screen.console, more)
    return {"output_dir": str(folder), **results}


def evaluate(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc evaluate lm ...`; the summary."""
    (arguments,) = _parse("evaluate", words)
    from ..runs.language_evaluation import run

    return {"output_dir": arguments.output_dir, "summary": run(arguments, console)}


def compare(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc compare image|text ...`; the summaries by forget set."""
    comparison, arguments, config = _parse("compare", words, _QUIET)
    return _compare("compare", words, console, comparison, arguments, config)


def audit(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc audit image|text|lm ...`; the summaries by forget set, or the readings by model."""
    if words[:1] == ["lm"]:
        (examined,) = _parse("audit", words)
        from ..runs.language_audit import run

        return run(examined, console, _command("audit", words))
    audited, comparison, arguments, config = _parse("audit", words, _QUIET)
    if audited.audited is None:
        raise UNSCError("audited: not given; name the unlearned model, by its Hub id or folder.")
    return _compare("audit", words, console, comparison, arguments, config, audited.audited)


def _compare(
    name: str, words: Sequence[str], console: Console, comparison: Any, arguments: Any, config: Any,
    audited: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare or audit, then write and print what was found."""
    from ..comparison.compare_methods import compare_methods
    from ..comparison.report import write_comparison
    from ..comparison.summary import markdown, table

    fill_output_dir(config, "comparison" if audited is None else "audit")
    result = compare_methods(comparison, arguments, config, console, audited=audited)
    summaries = write_comparison(result, Path(str(config.output_dir)), _command(name, words))
    for forgotten, summary in summaries.items():
        console.print(f"\n{forgotten}\n\n{markdown(table(summary))}", soft_wrap=True, markup=False)
    return {"output_dir": str(config.output_dir), "forget_sets": summaries}


def ablate(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc ablate image|text ...`; the paragraph of each study."""
    ablation, arguments, config = _parse("ablate", words, _QUIET)
    from ..comparison.run_studies import run_studies

    fill_output_dir(config, "studies")
    paragraphs = run_studies(ablation, arguments, config, _command("ablate", words), console)
    return {"output_dir": str(config.output_dir), "studies": paragraphs}


def push(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc push FOLDER --hub_model_id user/name ...`; the commit."""
    from ..reporting.hub import publish
    from .parser import OneLineParser

    parser = OneLineParser(prog="unsc push", description="Publish a finished run: one commit, and nothing private.")
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
    from ..reporting.run_folder import RESULTS, read_results
    from .parser import OneLineParser

    parser = OneLineParser(prog="unsc report", description="Make report.html again from a run's results.json.")
    parser.add_argument("folder", help="output folder of a finished run")
    folder = Path(parser.parse_args(list(words)).folder)
    results = read_results(folder)
    try:
        path = write_run_report(results, folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UNSCError(f"folder: {folder / RESULTS} is not what a run writes ({said}).") from error
    console.print(f"Report: {path}", markup=False)
    return {"report": str(path)}


def app(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc app FOLDER`; where the page was, once it is stopped."""
    from ..app import build, load_gradio, open_run, serve
    from .parser import OneLineParser

    parser = OneLineParser(prog="unsc app", description="A page to try a finished run on, until Ctrl+C.")
    parser.add_argument("folder", help="output folder of a finished run, or its Hub id")
    parser.add_argument("--original", help="folder or Hub id of the original, where it is not found by itself")
    parser.add_argument("--retrained", help="folder or Hub id of a model trained without the forgotten rows")
    parser.add_argument("--dataset", help="Hub id, file or folder of a classifier's data")
    parser.add_argument("--prompt_template", help="prompt of a language model's question, with {prompt}")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="the first free one from 7860 by default")
    options = vars(parser.parse_args(list(words)))
    host, port = options.pop("host"), options.pop("port")
    load_gradio()  # before anything long begins
    page = build(open_run(**options))
    address = serve(page, host, port, wait=False)
    console.print(f"Page: {address} (Ctrl+C stops it)", markup=False)
    page.block_thread()
    return {"page": address}


def doctor(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc doctor`; what it found, by name."""
    from .doctor import examine

    found = examine()
    for name, value in found.items():
        console.print(f"{name:<18} {value}", markup=False, highlight=False, soft_wrap=True)
    return found


def completion(words: Sequence[str], console: Console) -> dict[str, Any]:
    """`unsc completion bash|zsh`; the script."""
    from .completion import script

    if not words or words[0] not in ("bash", "zsh"):
        raise UNSCError(f"unsc: expected bash or zsh after completion, got {words[0] if words else 'nothing'!r}.")
    text = script(words[0])
    console.out(text, highlight=False)
    return {"script": text}


COMMANDS: dict[str, Callable[[Sequence[str], Console], dict[str, Any]]] = {
    command.__name__: command
    for command in (unlearn, audit, compare, ablate, evaluate, report, app, push, doctor, completion)
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        from .. import __version__

        print(f"unsc_hf {__version__}")
        return 0
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    console = Console(file=sys.stderr if as_json else sys.stdout, quiet=not first)
    try:
        if words[0] not in COMMANDS:
            raise UNSCError(f"unsc: {words[0]!r} is no command; closest: {closest(words[0], COMMANDS)}.")
        aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with full_disk_in_one_line(), aside:  # transformers prints; only the result is JSON
            result = COMMANDS[words[0]](words[1:], console)
    except UNSCError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        if as_json and first:
            print(json.dumps({"error": line}))
        return 2
    except KeyboardInterrupt:
        print("stopped: give the same command again; what is complete is used.", file=sys.stderr)
        return 130
    if as_json and first:
        from ..reporting.results import finite

        print(json.dumps(finite(result)))
    return 0


def run_recipe(main: Callable[[], Any]) -> None:
    """Run a script; what a user can correct is printed as one line on standard error, with exit code 2."""
    try:
        with full_disk_in_one_line():
            main()
    except UNSCError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def entry() -> None:
    """What the installed command runs."""
    raise SystemExit(main())
