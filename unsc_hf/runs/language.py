"""Whole jobs on language models: unlearning by each objective, with and without projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import SaveStrategy

from ..comparison.arguments import LanguageArguments, check_model_dtype
from ..config import UNSCConfig, parse_objective_args
from ..data.copies import without_overlap
from ..data.dialogues import PromptFormat, chunk_texts, to_dialogues
from ..data.selection import Request
from ..data.sources import load_config, load_data
from ..errors import UNSCError
from ..evaluation.answers import Answers, compare_answers, evaluate_answers, mean_answers
from ..evaluation.language.tofu import TofuEvaluation
from ..models.loading import load_as, load_tokenizer
from ..nullspace.statistics import ActivationStatistics
from ..objectives import OBJECTIVES
from ..reporting.plots import objective_title
from ..reporting.run_folder import check_output_folder
from ..reporting.screen import Screen
from ..reporting.tables import answers_table
from ..trainer.checkpoints import resume_from
from ..trainer.trainer import UNSCTrainer
from ..utils.phases import phase
from .evaluation_arguments import evaluation_arguments
from .examiner import Examiner
from .job import Job, UnlearningResult, finished_run, job_folder


@dataclass(frozen=True)
class LanguageRows:
    """Training rows to forget and to keep, unseen rows like them that no model was trained on, and other sets."""

    forget: Dataset
    retain: Dataset
    unseen: Dataset | None
    others: dict[str, Dataset]

    @classmethod
    def of(
        cls, forget: Dataset, retain: Dataset | None, request: Request | None, unseen: Dataset | None,
        others: Mapping[str, Dataset], prompt_format: PromptFormat,
    ) -> LanguageRows:  # fmt: skip
        """From raw rows. `request` chooses among the rows of `forget`, and the others are kept; None takes all.

        Raises:
            UNSCError: a request that leaves nothing to forget or to keep, or columns that hold no dialogues.
        """
        if request is not None:
            forget, kept = request.split(forget)
            retain = kept if retain is None else concatenate_datasets([kept, retain.cast(kept.features)])
        if retain is None:
            raise UNSCError("retain: not given; name the rows to forget, or give rows to keep.")
        dialogues = partial(to_dialogues, prompt_format=prompt_format)
        return cls(
            dialogues(forget),
            dialogues(retain),
            None if unseen is None else dialogues(unseen),
            {name: dialogues(rows) for name, rows in others.items()},
        )

    def in_chunks(self, tokenizer: Any, chunk_size: int | None) -> LanguageRows:
        """With long texts cut into chunks of `chunk_size` tokens; None leaves them whole."""
        cut = partial(chunk_texts, tokenizer=tokenizer, chunk_size=chunk_size)
        others = {name: cut(rows) for name, rows in self.others.items()}
        return LanguageRows(
            cut(self.forget), cut(self.retain), None if self.unseen is None else cut(self.unseen), others
        )

    def disjoint(self, config: UNSCConfig) -> LanguageRows:
        """The same without rows to keep that are copies of rows to forget, where `drop_overlap` says so.

        Raises:
            UNSCError: rows on both sides.
        """
        return replace(self, retain=without_overlap(self.forget, self.retain, config.drop_overlap))

    @property
    def train(self) -> Dataset:
        """What an original is trained on."""
        return concatenate_datasets([self.forget, self.retain])

    def sets(self) -> dict[str, Dataset]:
        """Everything that is reported on."""
        unseen = {} if self.unseen is None else {"unseen": self.unseen}
        return {"forget": self.forget, "retain": self.retain, **unseen, **self.others}


def load_rows(arguments: LanguageArguments, config: UNSCConfig) -> LanguageRows:
    """The rows of a request.

    Raises:
        UNSCError: splits or configurations that do not exist, a selection that leaves nothing to forget or to keep, or
            no unseen rows where they decide when to stop.
    """
    if arguments.dataset_name is None:
        raise UNSCError("dataset_name: not given; name a Hub id or a local folder with a forget and a retain split.")
    if (arguments.unseen_column is None) != (arguments.unseen_values is None):
        raise UNSCError("unseen_column: goes with unseen_values; give both.")
    forget, kept, unseen, others = (_configs if arguments.forget_config is not None else _splits)(arguments)
    retain: Dataset | None = kept
    if arguments.unseen_column is not None:
        apart = Request(column_values={arguments.unseen_column: arguments.unseen_values or []}, option="unseen_column")
        unseen, retain = apart.split(kept)
    request = arguments.request()
    same = (arguments.forget_split or "forget") == (arguments.retain_split or "retain")
    if arguments.forget_config is None and same:
        if request is None or unseen is not None:
            raise UNSCError(
                f"retain_split: {arguments.retain_split!r} is the forget_split too, with the same rows on both sides; "
                "name another split, or rows of this one to forget (forget_indices, without unseen_column)."
            )
        retain = None
    if request is not None:
        request.split(forget)  # a request that cannot be met is refused before anything is loaded
    check_unseen(unseen, config, "unseen_column" if arguments.forget_config is None else "unseen_config")
    name, tokenizer = arguments.model_name_or_path, None
    if name is not None and arguments.prompt_template is None and arguments.model_size is None:
        tokenizer = load_tokenizer(name)
    return LanguageRows.of(forget, retain, request, unseen, others, _prompt_format(arguments, tokenizer))


def _prompt_format(arguments: LanguageArguments, tokenizer: Any) -> PromptFormat:
    options = (arguments.system_prompt, arguments.chat_template_kwargs)
    return PromptFormat.of(arguments.prompt_template, tokenizer, *options)


_Parts = tuple[Dataset, Dataset, Dataset | None, dict[str, Dataset]]  # to forget, to keep, unseen, and others


def _splits(arguments: LanguageArguments) -> _Parts:
    loaded = load_data(str(arguments.dataset_name), arguments.dataset_config_name, arguments.cache_dir)
    known = ", ".join(sorted(loaded))
    used = (arguments.forget_split or "forget", arguments.retain_split or "retain")
    for argument, split in zip(("forget_split", "retain_split"), used, strict=True):
        if split not in loaded:
            raise UNSCError(f"{argument}: no split {split!r} in {arguments.dataset_name!r}; splits found: {known}.")
    names = arguments.eval_splits
    if names is None:
        names = [name for name in loaded if name not in used]
    absent = [name for name in names if name not in loaded]
    if absent:
        raise UNSCError(f"eval_splits: no split {absent[0]!r}; splits found: {known}.")
    others = {name: loaded[name] for name in names}
    return loaded[used[0]], loaded[used[1]], None, others


def _configs(arguments: LanguageArguments) -> _Parts:
    name, cache = str(arguments.dataset_name), arguments.cache_dir
    if arguments.retain_config is None:
        raise UNSCError("retain_config: not given; name the configuration with rows to keep beside forget_config.")
    splits = {"forget_config": arguments.forget_split, "retain_config": arguments.retain_split}
    parts = [load_config(name, str(getattr(arguments, a)), a, split, cache) for a, split in splits.items()]
    unseen = arguments.unseen_config
    return (
        parts[0],
        parts[1],
        None if unseen is None else load_config(name, unseen, "unseen_config", cache_dir=cache),
        {other: load_config(name, other, "eval_splits", cache_dir=cache) for other in arguments.eval_splits or ()},
    )


def check_unseen(unseen: Dataset | None, config: UNSCConfig, argument: str) -> None:
    """Refuse a job that could not tell when to stop; `argument` names the unseen rows."""
    if unseen is None and config.target_forget_accuracy is None:
        raise UNSCError(
            f"{argument}: not given; unlearning stops when the forgotten answers are known no better than unseen ones: "
            "name rows that no model was trained on, or set target_forget_accuracy."
        )


def run(
    arguments: LanguageArguments, config: UNSCConfig, screen: Screen | None = None, command: str = ""
) -> UnlearningResult:
    """Unlearn, compare, and write everything into `config.output_dir`; see `classification.run`.

    Raises:
        UNSCError: input that cannot work; nothing is written then.
    """
    check_model_dtype(arguments)
    check_output_folder(str(config.output_dir))
    phase("Loading the data")
    rows = load_rows(arguments, config).disjoint(config)
    sets = None if arguments.forget_config is None else evaluation_arguments(arguments).sets(refuse_overlap=False)
    with job_folder(str(config.output_dir), screen):
        job = Job.of(arguments, config, arguments.plan(config), rows.train, rows.retain, command)
        rows = rows.in_chunks(job.processor, arguments.chunk_size)
        tofu: Callable[..., TofuEvaluation] | None = None
        if sets is not None:
            tofu = partial(
                TofuEvaluation, tokenizer=job.processor, sets=sets,
                prompt_format=_prompt_format(arguments, job.processor), max_new_tokens=arguments.max_new_tokens,
                batch_size=config.per_device_eval_batch_size, progress=not config.disable_tqdm,
            )  # fmt: skip
        length = (arguments.max_generated_rows, arguments.max_new_tokens)
        result = unlearn_language_model(job, rows, arguments.objectives, *length, tofu)
        result.deliver(config)
    return result


def unlearn_language_model(
    job: Job, rows: LanguageRows, objectives: Sequence[str] | None = None, max_generated_rows: int = 300,
    max_new_tokens: int = 100, tofu: Callable[..., TofuEvaluation] | None = None,
) -> UnlearningResult:  # fmt: skip
    """Unlearn by each objective from the same original; statistics are collected once.

    Args:
        job: models and options; its controls are the same objectives without projection.
        rows: what to forget and to keep.
        objectives: the first one's model is the result; the one of the options when None.
        max_generated_rows, max_new_tokens: rows of each set that are answered for ROUGE-L, and the longest answer.
        tofu: TOFU's evaluation of a model, where the data has its configurations.

    Raises:
        UNSCError: an unknown objective, or input that cannot work.
    """
    config = job.config
    objectives = list(objectives or [config.objective])
    unknown = [name for name in objectives if name not in OBJECTIVES]
    if unknown:
        raise UNSCError(f"objectives: {unknown[0]!r} does not exist; choose from {', '.join(OBJECTIVES)}.")
    common = {
        "tokenizer": job.processor,
        "max_rows": max_generated_rows,
        "batch_size": config.per_device_eval_batch_size,
    }
    evaluate = partial(
        evaluate_answers, sets=rows.sets(), max_new_tokens=max_new_tokens, progress=not config.disable_tqdm, **common
    )
    original = job.load().to(config.device)
    compare = partial(compare_answers, original, rows=rows.retain, **common)
    null_spaces = ("retained", "none") if job.controls else ("retained",)
    first, *others = [(objective, null_space) for objective in objectives for null_space in null_spaces]

    examine = Examiner(evaluate, compare, tofu)
    reference = partial(load_as, AutoModelForCausalLM, argument="retrained_model_name_or_path")
    phase("Answers of the original and the retrained models")
    references = [examine("retrained", reference(name).to(config.device)) for name in job.retrained]
    methods = {"original": examine("original", original, leak=0.0)}
    phase("Statistics of the rows to keep")
    trainer = _trainer(job, rows, *first)
    preparing = sum(trainer.prepare_unlearning().seconds.values())
    statistics = trainer.spaces.retained
    phase(f"Unlearning: {objective_title(objectives[0])}")
    trainer.train(resume_from_checkpoint=resume_from(config.resume_from_checkpoint))
    certificate = trainer.certify().to_dict()
    methods[objectives[0]] = _unlearned(objectives[0], trainer, examine, preparing)
    for objective, null_space in others:
        name = objective if null_space == "retained" else f"{objective} unprojected"
        phase(f"Unlearning: {objective_title(name)}")
        other = _trainer(job, rows, objective, null_space, statistics)
        other.train()
        methods[name] = _unlearned(name, other, examine, preparing)
    if references:
        methods["retrained"] = mean_answers(references)
    run = finished_run(
        job, trainer, rows.forget, "text-generation",
        details={"target_token_accuracy": trainer.goal.target}, methods=methods,
        references=references, certificate=certificate, verdict="not judged",
        reason="answers are compared with a retrained model's in the table; the representation was not examined",
        table=answers_table(methods, objectives[0]),
    )  # fmt: skip
    result = UnlearningResult(trainer, run)
    result.evaluations = examine.results
    return result


def _trainer(
    job: Job, rows: LanguageRows, objective: str, null_space: str, statistics: ActivationStatistics | None = None
) -> UNSCTrainer:
    """A trainer on a fresh original; without `statistics` it is the one whose model is written."""
    options = job.config.control(null_space)
    options.objective = objective
    options.objective_args = OBJECTIVES[objective].own(parse_objective_args(job.config.objective_args))
    if statistics is not None:
        options.save_strategy = SaveStrategy.NO  # its checkpoints would take the place of the first one's
    return UNSCTrainer(
        job.load(), options, rows.forget, rows.retain, processing_class=job.processor, unseen_dataset=rows.unseen,
        statistics=statistics, peft_config=job.peft_config,
    )  # fmt: skip


def _unlearned(name: str, trainer: UNSCTrainer, examine: Examiner, preparing: float) -> Answers:
    """Metrics of an unlearned model; its cost includes `preparing`, the seconds of the statistics."""
    return examine(
        name, trainer.unwrapped(), leak=trainer.held_out_leak().total, seconds=preparing + trainer.unlearning_seconds,
        steps=trainer.state.global_step, stopped_by=trainer.stop_reason,
    )  # fmt: skip
