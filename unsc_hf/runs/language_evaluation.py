"""`unsc evaluate lm`: TOFU's and MUSE's metrics of any causal language model, in open-unlearning's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data.dialogues import PromptFormat
from ..errors import UNSCError, first_line
from ..evaluation.language.tofu import MUSE, SUMMARY, MissingInputError, TofuEvaluation
from ..models.loading import load_as, load_tokenizer
from ..utils.distributed import gathered, process
from ..utils.files import write_text
from ..utils.fingerprint import data_fingerprint, weight_hash
from .evaluation_arguments import EvaluationArguments, ExaminedArguments

EVAL, SUMMARY_FILE, SETTINGS = "TOFU_EVAL.json", "TOFU_SUMMARY.json", "evaluation.json"
MUSE_EVAL = EVAL.replace("TOFU", "MUSE")


def evaluate_language_model(
    model: PreTrainedModel | str,
    dataset_name: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    console: Console | None = None,
    **options: Any,
) -> dict[str, float]:
    """Evaluate a causal language model as TOFU does, and write `TOFU_EVAL.json` and `TOFU_SUMMARY.json`.

    Metrics that are in `output_dir` already are not computed again. Several processes share the rows, each with the
    whole model, and come to the same numbers as one.

    Args:
        model: the model or adapter, or its Hub id or folder.
        dataset_name: a Hub id or folder with configurations as TOFU is published, or splits.
        tokenizer: the one saved with the model when None.
        console: where the summary is printed; nowhere when None.
        **options: other fields of `EvaluationArguments`, such as `forget_config` and `retain_logs`.

    Returns:
        The summary, by metric.

    Raises:
        UNSCError: input that cannot work.
    """
    given = {"model_name_or_path": model if isinstance(model, str) else None, "dataset_name": dataset_name, **options}
    arguments = EvaluationArguments(**given)
    return run(arguments, console or Console(quiet=True), None if isinstance(model, str) else model, tokenizer)


def run(
    arguments: EvaluationArguments,
    console: Console,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """See `evaluate_language_model`; a model that is given need not be loaded."""
    state = PartialState(cpu=arguments.use_cpu or None)
    name = arguments.model_name_or_path or (str(model.config._name_or_path) if model is not None else None)
    if name is None:
        raise UNSCError("model_name_or_path: not given; name the model to evaluate.")
    sets = arguments.sets()
    load = partial(load_as, AutoModelForCausalLM, dtype=getattr(torch, arguments.model_dtype))
    if model is None:
        model = load(name, "model_name_or_path").to(state.device)
    reference = arguments.reference_model
    evaluation = evaluation_of(arguments, model, tokenizer if tokenizer is not None else load_tokenizer(name), sets)
    if reference is not None:
        evaluation.load_reference = lambda: load(reference, "reference_model").to(state.device)
    settings = _settings(arguments, evaluation)
    if arguments.retain_logs is not None:
        evaluation.retain_logs = read_retain_logs(Path(arguments.retain_logs), evaluation, settings["parameters"])
    folder = Path(arguments.output_dir)
    muse = "forget_verbmem" in sets
    metrics, file = (MUSE, MUSE_EVAL) if muse else (SUMMARY, EVAL)
    evaluation.results.update(gathered(_finished(folder, settings, arguments.overwrite, file), state.device)[0])
    left_out: dict[str, str] = {}
    # A reference model that cannot be loaded is refused before the long work.
    for metric in sorted(arguments.metrics or metrics, key=lambda name: name != "mia_reference"):
        try:
            evaluation.result(metric)
        except MissingInputError as error:
            left_out[metric] = str(error)
        _write(folder, {**settings, "left_out": left_out}, evaluation.results, file)
    state.wait_for_everyone()  # no process leaves before everything is written
    summary = summarise(evaluation.results)
    if process()[0] == 0:
        lines = [f"{metric:20} {value:.6g}" for metric, value in summary.items()]
        lines += [f"Left out: {metric} ({reason})." for metric, reason in left_out.items()]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return summary


def evaluation_of(
    arguments: ExaminedArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: dict[str, Dataset]
) -> TofuEvaluation:
    """A model's evaluation on some rows; rows that it cannot read are refused, also if its tokenizer knows no limit."""
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and most < tokenizer.model_max_length:
        tokenizer.model_max_length = most
    return TofuEvaluation(
        model, tokenizer, sets,
        PromptFormat.of(arguments.prompt_template, tokenizer, arguments.system_prompt, arguments.chat_template_kwargs),
        batch_size=arguments.per_device_eval_batch_size, max_new_tokens=arguments.max_new_tokens,
        progress=not arguments.disable_tqdm,
    )  # fmt: skip


def summarise(results: Mapping[str, Any]) -> dict[str, float]:
    """The aggregates of the metrics that open-unlearning summarises, sorted by name."""
    return {name: results[name]["agg_value"] for name in sorted({*SUMMARY, *MUSE}) if name in results}


def _settings(arguments: EvaluationArguments, evaluation: TofuEvaluation) -> dict[str, Any]:
    """What the numbers depend on: an evaluation is continued, or used as retain logs, only where it agrees."""
    prompts = evaluation.prompt_format
    return {
        "model": weight_hash(evaluation.model)[:16],
        "parameters": sum(parameter.numel() for parameter in evaluation.model.parameters()),
        "model_dtype": str(evaluation.model.dtype).removeprefix("torch."),
        "sets": {name: data_fingerprint(rows)[:16] for name, rows in evaluation.sets.items()},
        "prompt_template": prompts.template,
        "system_prompt": prompts.system_prompt,
        "chat_template_kwargs": prompts.chat_template_kwargs,
        "per_device_eval_batch_size": evaluation.batch_size,
        "max_new_tokens": evaluation.max_new_tokens,
        "retain_logs": arguments.retain_logs,
        "reference_model": arguments.reference_model,
    }


def read_retain_logs(file: Path, evaluation: TofuEvaluation, parameters: int) -> dict[str, Any]:
    """The `TOFU_EVAL.json` of a retrained model, by this package or by open-unlearning.

    Raises:
        UNSCError: an unreadable file, or logs of other rows or of a model of another size.
    """
    try:
        logs = json.loads(file.read_text(encoding="utf-8"))
        muse = "forget_verbmem" in evaluation.sets
        ratios = (logs["mia_min_k"]["forget"] if muse else logs["forget_truth_ratio"])["value_by_index"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"has no {error.args[0]}" if isinstance(error, KeyError) else f"cannot be read ({first_line(error)})"
        raise UNSCError(f"retain_logs: {file} {what}; give the TOFU_EVAL.json of a retrained model.") from error
    rows = evaluation.rows("forget")
    logged = [row["ground_truth"] for row in logs.get("forget_Q_A_ROUGE", {}).get("value_by_index", {}).values()]
    pairs = zip(map(_letters, logged), map(_letters, rows["answer"]) if logged else (), strict=False)
    other = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
    if len(ratios) != len(rows) or other is not None:
        seen = f"{len(ratios)} rows, here are {len(rows)}" if len(ratios) != len(rows) else f"row {other} differs"
        raise UNSCError(
            f"retain_logs: {file} is of another data set ({seen}); evaluate the retrained model on the same forget set."
        )
    beside = file.with_name(SETTINGS)
    if file.name == EVAL and beside.is_file():
        size = json.loads(beside.read_text(encoding="utf-8"))["parameters"]
        if size != parameters:
            raise UNSCError(
                f"retain_logs: {file} is of a model of {size:,} parameters, this one has {parameters:,}; evaluate a "
                "retrained model of the same size."
            )
    return dict(logs)


def _letters(text: str) -> str:
    """Letters and digits of a text: white space and punctuation change when tokens become text again."""
    return "".join(filter(str.isalnum, text))


def _finished(folder: Path, settings: Mapping[str, Any], overwrite: bool, file: str) -> dict[str, Any]:
    """The metrics that are in the folder already; UNSCError for an evaluation with other settings."""
    if overwrite or not (folder / file).exists():
        return {}
    try:
        before, finished = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SETTINGS, file))
    except (OSError, ValueError) as error:
        raise UNSCError(
            f"output_dir: cannot continue in {folder} ({first_line(error)}); choose another, or use overwrite."
        ) from error
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise UNSCError(
                f"output_dir: {folder} holds an evaluation with {name} {before.get(name)}, not {value}; choose another "
                "folder, or use overwrite."
            )
    return dict(finished)


def _write(folder: Path, settings: Mapping[str, Any], results: Mapping[str, Any], file: str) -> None:
    """Write everything, each file completely or not at all; the first process does."""
    summary = file.replace("EVAL", "SUMMARY")
    contents = {SETTINGS: settings, file: dict(sorted(results.items())), summary: summarise(results)}
    for name, content in contents.items() if process()[0] == 0 else ():
        write_text(folder / name, json.dumps(content, indent=4))
