"""The whole run behind `recipes/unlearn_causal_lm.py`: data, models, unlearning by each objective, comparison, files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy

from ..config import UNSCConfig
from ..data.dialogues import AnswerCollator, prepare_dialogues, to_dialogues
from ..data.selection import Request
from ..data.sources import load_data
from ..errors import UNSCError
from ..evaluation.generation import generate_answers, rouge_l, token_metrics, truth_ratio
from ..models.loading import load_as, load_tokenizer
from ..models.outputs import Outputs, iterate_outputs, read_answers, token_losses
from ..nullspace.statistics import ActivationStatistics
from ..objectives import OBJECTIVES
from ..reporting.html import FILE as REPORT
from ..reporting.model_card import CardContent, public_name, typed_command, versions, write_card
from ..reporting.plots import objective_title, plot_answers, plot_capacity, plot_unlearning
from ..reporting.report import write_run_report
from ..reporting.results import finite, options_of
from ..reporting.run_folder import check_output_folder, finish, move_model
from ..trainer.checkpoints import has_checkpoint, resume_from
from ..trainer.trainer import UNSCTrainer
from ..utils.fingerprint import data_fingerprint
from .arguments import SharedArguments, check_model_dtype, load_original, lora_config
from .references.language_models import LanguagePlan
from .references.training import train_model
from .unlearning import frozen_line

PICTURES = (
    ("answers.png", "ROUGE-L of the answers on each set, before, after and when retrained"),
    ("unlearning.png", "Token accuracy and leak while unlearning"),
    ("capacity.png", "Rank and capacity of each layer"),
)


TABLE_NOTE = (
    "Percent, except loss and seconds. ROUGE-L: share of the true answer's words that the greedy answer brings in their order, on each "
    "set. Extraction: share of a forgotten answer that the model recites from the tokens before it. 'Unprojected': without confinement "
    "to the null space."
)


@dataclass
class LanguageArguments(SharedArguments):
    """Which answers to forget, from which language model.

    The forget split is forgotten whole, or the part of it that `forget_indices` or `forget_column` names; the rest is kept.
    """

    forget_split: str = field(default="forget", metadata={"help": "Split with the rows to forget."})
    retain_split: str = field(default="retain", metadata={"help": "Split with rows to keep."})
    unseen_column: str | None = field(
        default=None, metadata={"help": "Column that marks rows of the retain split no model is trained on."}
    )
    unseen_values: list[str] | None = field(default=None, metadata={"help": "Its values in those rows."})
    eval_splits: list[str] | None = field(
        default=None, metadata={"help": "More splits to report on; every other split by default."}
    )
    prompt_template: str = field(
        default="Question: {question}\nAnswer:", metadata={"help": "Prompt of a row with question and answer."}
    )
    objectives: list[str] | None = field(
        default=None, metadata={"help": "Objectives to compare; the first one's model is written. UNSC by default."}
    )
    max_generated_rows: int = field(default=300, metadata={"help": "Rows of each set that are answered for ROUGE-L."})
    max_new_tokens: int = field(default=100, metadata={"help": "Longest answer."})
    vocabulary_size: int = field(default=2048, metadata={"help": "Tokens of the tokenizer learned for model_size."})
    max_length: int = field(default=256, metadata={"help": "Longest row in tokens, for model_size."})

    def plan(self, config: UNSCConfig) -> LanguagePlan:
        """How originals and references are trained."""
        return LanguagePlan(
            **self.base_plan(config.seed), vocabulary_size=self.vocabulary_size, max_length=self.max_length
        )


@dataclass(frozen=True)
class LanguageData:
    """Rows by what happens to them.

    Attributes:
        forget, retain: training rows to forget and to keep.
        unseen: rows like them that no model was trained on, or None.
        others: more sets to report on.
    """

    forget: Dataset
    retain: Dataset
    unseen: Dataset | None
    others: dict[str, Dataset]

    @property
    def train(self) -> Dataset:
        """What an original is trained on."""
        return concatenate_datasets([self.forget, self.retain])

    def sets(self) -> dict[str, Dataset]:
        """Everything that is reported on."""
        unseen = {} if self.unseen is None else {"unseen": self.unseen}
        return {"forget": self.forget, "retain": self.retain, **unseen, **self.others}


def load_language_data(arguments: LanguageArguments) -> LanguageData:
    """The splits of a request.

    Raises:
        UNSCError: splits that do not exist, or a selection that leaves nothing to forget or to keep.
    """
    if arguments.dataset_name is None:
        raise UNSCError("dataset_name: not given; name a Hub id or a local folder with a forget and a retain split.")
    loaded = load_data(arguments.dataset_name, arguments.dataset_config_name, arguments.cache_dir)
    for argument in ("forget_split", "retain_split"):
        if getattr(arguments, argument) not in loaded:
            raise UNSCError(
                f"{argument}: no split {getattr(arguments, argument)!r} in {arguments.dataset_name!r}; "
                f"splits found: {', '.join(sorted(loaded))}."
            )
    forget, retain = loaded[arguments.forget_split], loaded[arguments.retain_split]
    if (arguments.unseen_column is None) != (arguments.unseen_values is None):
        raise UNSCError("unseen_column: goes with unseen_values; give both.")
    unseen = None
    if arguments.unseen_column is not None:
        apart = Request(column_values={arguments.unseen_column: arguments.unseen_values or []}, option="unseen_column")
        unseen, retain = apart.split(retain)
    request = arguments.request()
    if request is not None:
        forget, kept = request.split(forget)
        retain = concatenate_datasets([kept, retain.cast(kept.features)])
    names = arguments.eval_splits
    if names is None:
        names = [name for name in loaded if name not in (arguments.forget_split, arguments.retain_split)]
    absent = [name for name in names if name not in loaded]
    if absent:
        raise UNSCError(f"eval_splits: no split {absent[0]!r}; splits found: {', '.join(sorted(loaded))}.")

    def dialogues(rows: Dataset) -> Dataset:
        return to_dialogues(rows, arguments.prompt_template)

    return LanguageData(
        dialogues(forget),
        dialogues(retain),
        None if unseen is None else dialogues(unseen),
        {name: dialogues(loaded[name]) for name in names},
    )


@dataclass(frozen=True)
class Answers:
    """How a model answers, by set: loss, perplexity, token_accuracy, extraction_strength, rouge_l, truth_ratio."""

    sets: dict[str, dict[str, float]]
    leak: float | None = None
    seconds: float | None = None
    steps: int | None = None
    stopped_by: str | None = None


def evaluate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Dataset],
    *,
    max_rows: int,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """All metrics of a model on each set; ROUGE-L on the first `max_rows` rows of greedy answers.

    Sets with columns `paraphrased_answer` and `perturbed_answer` also get a truth ratio.
    """
    found = {}
    for name, rows in sets.items():
        metrics = token_metrics(_read(model, tokenizer, rows, batch_size))
        if "completion" in rows.column_names:
            part = rows.select(range(min(max_rows, len(rows))))
            answers = generate_answers(model, tokenizer, part["prompt"][:], max_new_tokens, progress=progress)
            scores = [rouge_l(answer, true) for answer, true in zip(answers, part["completion"][:], strict=True)]
            metrics["rouge_l"] = float(np.mean(scores))
        if {"paraphrased_answer", "perturbed_answer"} <= set(rows.column_names):
            metrics["truth_ratio"] = _truth_ratio(model, tokenizer, rows, batch_size)
        found[name] = metrics
    return found


def _read(model: PreTrainedModel, tokenizer: Any, rows: Dataset, batch_size: int) -> Any:
    prepared = prepare_dialogues(rows, tokenizer, completion_only=True)
    return iterate_outputs(model, prepared, AnswerCollator.of(tokenizer), batch_size=batch_size, read=read_answers)


def _mean_likelihoods(model: PreTrainedModel, tokenizer: Any, rows: Dataset, batch_size: int) -> list[float]:
    """Log-likelihood per token of each row's completion."""
    values: list[float] = []
    for part in _read(model, tokenizer, rows, batch_size):
        values += _per_sample(part)
    return values


def _per_sample(part: Outputs) -> list[float]:
    assert part.samples is not None
    each, samples = -token_losses(part).cpu(), part.samples.cpu()
    return [float(each[samples == sample].mean()) for sample in range(int(samples.max()) + 1)]


def _truth_ratio(model: PreTrainedModel, tokenizer: Any, rows: Dataset, batch_size: int) -> float:
    def likelihoods(answers: Sequence[str], prompts: Sequence[str]) -> list[float]:
        texts = Dataset.from_dict({"prompt": list(prompts), "completion": [f" {answer.strip()}" for answer in answers]})
        return _mean_likelihoods(model, tokenizer, texts, batch_size)

    prompts = rows["prompt"][:]
    right = likelihoods(rows["paraphrased_answer"][:], prompts)
    wrong = []
    for prompt, answers in zip(prompts, rows["perturbed_answer"][:], strict=True):
        several = [answers] if isinstance(answers, str) else list(answers)
        wrong.append(likelihoods(several, [prompt] * len(several)))
    return truth_ratio(right, wrong)


@dataclass(frozen=True)
class LanguageComparison:
    """Everything a run found out.

    Attributes:
        methods: by name: "original", each objective, "<objective> unprojected", "retrained" (mean of the references).
        references: of each retrained model.
        certificate: of the model that was written.
        trainer: its trainer.
    """

    methods: dict[str, Answers]
    references: list[Answers]
    certificate: dict[str, Any]
    trainer: UNSCTrainer


def compare_objectives(
    original: str,
    data: LanguageData,
    config: UNSCConfig,
    arguments: LanguageArguments,
    references: Sequence[str],
    console: Console,
) -> LanguageComparison:
    """Unlearn by each objective, with and without projection, from the same original; statistics are collected once."""
    objectives = arguments.objectives or [config.objective]
    unknown = [name for name in objectives if name not in OBJECTIVES]
    if unknown:
        raise UNSCError(f"objectives: {unknown[0]!r} does not exist; choose from {', '.join(OBJECTIVES)}.")
    tokenizer = load_tokenizer(original)
    progress = not config.disable_tqdm

    def answers(model: PreTrainedModel) -> dict[str, dict[str, float]]:
        return evaluate_answers(
            model,
            tokenizer,
            data.sets(),
            max_rows=arguments.max_generated_rows,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=config.per_device_eval_batch_size,
            progress=progress,
        )

    def trainer(objective: str, null_space: str, statistics: Any) -> UNSCTrainer:
        options = deepcopy(config)
        options.objective, options.null_space, options.push_to_hub = objective, null_space, False
        if null_space != "retained" or first is not None:
            options.save_strategy = SaveStrategy.NO  # their checkpoints would take the place of the first run's
        return UNSCTrainer(
            model=load_original(arguments, AutoModelForCausalLM, original),
            args=options,
            forget_dataset=data.forget,
            retain_dataset=data.retain,
            processing_class=tokenizer,
            unseen_dataset=data.unseen,
            statistics=statistics,
            peft_config=lora_config(arguments),
        )

    methods = {"original": Answers(answers(load_original(arguments, AutoModelForCausalLM, original)), leak=0.0)}
    first: UNSCTrainer | None = None
    collected: ActivationStatistics | None = None
    certificate: dict[str, Any] = {}
    for objective in objectives:
        for null_space in ("retained", "none") if arguments.controls else ("retained",):
            console.print(f"Unlearning: {objective}{'' if null_space == 'retained' else ', no projection'}.")
            run = trainer(objective, null_space, collected)
            run.prepare_unlearning()
            if collected is None:
                collected = run.retained_statistics
            resume = resume_from(config.resume_from_checkpoint) if first is None else None
            run.train(resume_from_checkpoint=resume)
            if first is None:
                first = run
                certificate = run.certify().to_dict()
            assert run.plan is not None
            assert first.plan is not None
            network = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
            name = objective if null_space == "retained" else f"{objective} unprojected"
            methods[name] = Answers(
                answers(network),
                leak=run.held_out_leak().total,
                seconds=sum(first.plan.seconds.values()) + run.unlearning_seconds,
                steps=run.state.global_step,
                stopped_by=run.stop_reason,
            )
    found = [
        Answers(answers(load_as(AutoModelForCausalLM, name, "retrained_model_name_or_path"))) for name in references
    ]
    if found:
        methods["retrained"] = Answers(
            {
                name: {key: float(np.mean([one.sets[name][key] for one in found])) for key in metrics}
                for name, metrics in found[0].sets.items()
            }
        )
    assert first is not None
    return LanguageComparison(methods, found, certificate, first)


def run(arguments: LanguageArguments, config: UNSCConfig, console: Console | None = None) -> LanguageComparison:
    """Unlearn, compare, and write everything into `config.output_dir`.

    Raises:
        UNSCError: input that cannot work; nothing is written then.
    """
    console = console or Console()
    check_model_dtype(arguments)
    check_output_folder(str(config.output_dir))
    data = load_language_data(arguments)
    if data.unseen is None and config.target_forget_accuracy is None:
        raise UNSCError(
            "unseen_column: not given; unlearning stops when the forgotten answers are known no better than unseen ones: "
            "name rows that no model was trained on, or set target_forget_accuracy."
        )
    plan, folder = arguments.plan(config), arguments.references_dir
    original = arguments.model_name_or_path
    if arguments.train_original:
        if plan.size is None and plan.base_model is None:
            raise UNSCError("train_original: needs model_size (from scratch) or model_name_or_path (to fine-tune).")
        console.print("Original model: training it, or taking it from an earlier run.")
        original = str(train_model(data.train, plan, folder, "original"))
    if original is None:
        raise UNSCError(
            "model_name_or_path: not given; name the model to unlearn, or use --train_original with --model_size."
        )
    references = list(arguments.retrained_model_name_or_path or [])
    if arguments.train_retrained:
        if plan.size is None and not arguments.train_original:
            raise UNSCError(
                "train_retrained: fine-tuning model_name_or_path would begin with a model that knows the forgotten rows; "
                "give model_size, or use --train_original too, with a base model that was not trained on this data."
            )
        console.print("Retrained reference: training it, or taking it from an earlier run.")
        vocabulary = data.train if plan.base_model is None else None
        references.append(str(train_model(data.retain, plan, folder, "retrained", vocabulary=vocabulary)))
    existed = Path(str(config.output_dir)).exists()
    try:
        result = compare_objectives(original, data, config, arguments, references, console)
    except UNSCError:
        if not existed and not has_checkpoint(str(config.output_dir)):
            shutil.rmtree(str(config.output_dir), ignore_errors=True)
        raise
    move_model(result.trainer, Path(str(config.output_dir)))
    if result.trainer.is_world_process_zero():
        _write(arguments, config, result, original, data)
        _print(console, result, config)
    result.trainer.accelerator.wait_for_everyone()  # nobody leaves before everything is written
    if config.push_to_hub:
        result.trainer.push_to_hub()
    return result


def answers_table(methods: dict[str, Answers]) -> list[list[str]]:
    """The comparison as text cells, first the header: ROUGE-L and extraction strength of each set."""
    names = list(next(iter(methods.values())).sets)
    rows = [["model", *(f"ROUGE-L {name}" for name in names), "extraction forget", "loss forget", "leak", "seconds"]]
    for method, answers in methods.items():
        sets = answers.sets
        rows.append(
            [
                objective_title(method),
                *(f"{100 * sets[name]['rouge_l']:.1f}" if "rouge_l" in sets[name] else "–" for name in names),
                f"{100 * sets['forget']['extraction_strength']:.1f}",
                f"{sets['forget']['loss']:.2f}",
                "–" if answers.leak is None else f"{100 * answers.leak:.2g}",
                "–" if answers.seconds is None else f"{answers.seconds:.0f}",
            ]
        )
    return rows


def _write(
    arguments: LanguageArguments, config: UNSCConfig, result: LanguageComparison, original: str, data: LanguageData
) -> None:
    """Everything a run leaves beside its model; `results.json` comes last and marks the run as finished."""
    trainer, folder = result.trainer, Path(str(config.output_dir))
    plan = trainer.plan
    assert plan is not None
    plot_answers({name: answers.sets for name, answers in result.methods.items()}, folder / PICTURES[0][0])
    plot_unlearning(trainer.state.log_history, config.max_leak, folder / PICTURES[1][0])
    plot_capacity(plan.subspace.report(), folder / PICTURES[2][0])
    dataset = public_name(str(arguments.dataset_name))
    options = options_of(config, ("objective_beta", "completion_only_loss"))
    options |= {"objective": trainer.args.objective, "pseudo_labels": trainer.pseudo_label_strategy}
    command = typed_command()
    content = CardContent(
        model_name=str(config.hub_model_id or folder.resolve().name),
        base_model=public_name(original),
        model_class=trainer.model_class,
        adapter=arguments.use_peft,
        base_dtype=arguments.model_dtype,
        forgotten=[],
        forgotten_rows=len(data.forget),
        forgotten_digest=data_fingerprint(data.forget)[:16],
        dataset=dataset,
        dataset_on_hub=not Path(str(arguments.dataset_name)).exists(),
        table=answers_table(result.methods),
        written=objective_title(trainer.args.objective),
        references=len(result.references),
        certificate=result.certificate,
        verdict="not judged",
        reason="answers are compared with a retrained model's in the table; the representation was not examined",
        hyperparameters=options,
        pictures=PICTURES,
        report=REPORT,
        license=arguments.license,
        command=command,
        task="text-generation",
    )
    trainer.card_content = content
    write_card(content, folder)
    results = {
        "request": {"rows": len(data.forget), "dataset": dataset, "model": public_name(original)},
        "verdict": {"word": content.verdict, "reason": content.reason},
        "methods": {name: asdict(answers) for name, answers in result.methods.items()},
        "retrained_references": [asdict(answers) for answers in result.references],
        "certificate": result.certificate,
        "seconds": {**plan.seconds, "unlearning": trainer.unlearning_seconds},
        "target_token_accuracy": plan.target,
        "subspace": plan.subspace.to_dict(),
        "frozen": plan.selection.frozen,
        "history": [entry for entry in trainer.state.log_history if "leak" in entry],
        "hyperparameters": options,
        "command": command,
        "versions": versions(),
        "table": content.table,
        "written": content.written,
        "table_note": TABLE_NOTE,
        "pictures": PICTURES,
    }
    results = finite(results)
    write_run_report(results, folder)
    finish(folder, results)


def _print(console: Console, result: LanguageComparison, config: UNSCConfig) -> None:
    header, *rows = answers_table(result.methods)
    short = [column.removeprefix("ROUGE-L ").replace("_", " ") for column in header[:-4]]
    table = Table(
        title="ROUGE-L of the answers to each set; extraction, loss, leak (percent, but loss)",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, column in enumerate([*short, "extr.", "loss", "leak", "sec"]):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == objective_title(result.trainer.args.objective) else None)
    console.print(table)
    certificate = result.certificate
    console.print(
        f"Certificate: held-out leak {certificate['leak']:.3g}, logit drift {certificate['drift']['relative']:.3g}; "
        f"ended by {certificate['stop_reason']}."
    )
    console.print(frozen_line(result.trainer))
    console.print(f"Model, card, pictures and results: {config.output_dir}")
