"""What all jobs share: their models and options, the folder they write into, and `UnlearningResult`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import CommitInfo, ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..comparison.arguments import SharedArguments, load_original, lora_config
from ..comparison.references.texts import LanguagePlan, TextPlan
from ..comparison.references.training import TrainingPlan, train_model
from ..config import UNSCConfig
from ..errors import UNSCError
from ..models.loading import load_config
from ..reporting.finished_run import FinishedRun, Origin
from ..reporting.hub import publish
from ..reporting.model_card import public_name, write_card
from ..reporting.results import options_of, write_run
from ..reporting.run_folder import check_output_folder, move_model
from ..reporting.screen import LOG, Screen
from ..reporting.tables import Table
from ..trainer.sequence import StoredRequest
from ..trainer.trainer import UNSCTrainer
from ..utils.fingerprint import data_fingerprint
from ..utils.phases import phase
from ..utils.reserve import reserved
from .examiner import write_evaluations

DIGITS = "scikit-learn digits"  # how results name the quickstart's data


@dataclass(frozen=True)
class Job:
    """What is unlearned, and how."""

    load: Callable[[], PreTrainedModel]  # gives the original, anew at each call
    processor: Any  # image processor or tokenizer; None for rows that need none
    config: UNSCConfig
    origin: Origin
    retrained: Sequence[str]  # folders or Hub ids of models trained without the forgotten rows
    controls: bool
    peft_config: PeftConfig | None

    @classmethod
    def of(
        cls, arguments: SharedArguments, config: UNSCConfig, plan: TrainingPlan, train: Dataset, retain: Dataset,
        command: str, retrained_name: str = "retrained", labels: Sequence[str] = (), column: str | None = None,
    ) -> Job:  # fmt: skip
        """The job that the command line describes; its models are given, found from an earlier run, or trained now.

        Raises:
            UNSCError: no original, or a reference that would start from a model which knows the forgotten rows.
        """
        folder, original = arguments.references_dir, arguments.model_name_or_path
        references = list(arguments.retrained_model_name_or_path or [])
        for name in references:  # before anything long begins
            load_config(name, "retrained_model_name_or_path")
        if arguments.quickstart or arguments.train_original:
            if plan.size is None and plan.base_model is None:
                raise UNSCError("train_original: needs model_size (from scratch) or model_name_or_path (to fine-tune).")
            phase("Original model")
            original = str(train_model(train, plan, folder, "original", labels, column))
        if original is None:
            raise UNSCError(
                "model_name_or_path: not given; name the model to unlearn, or use --train_original with --model_size."
            )
        if arguments.quickstart or arguments.train_retrained:
            if plan.size is None and not arguments.train_original:
                raise UNSCError(
                    "train_retrained: fine-tuning model_name_or_path would begin with a model that knows the forgotten "
                    "rows; give model_size, or use --train_original too, with a base model not trained on this data."
                )
            phase("Model retrained without the forgotten rows")
            # A reference must read the same tokens as the original.
            vocabulary = train if isinstance(plan, TextPlan | LanguagePlan) and plan.base_model is None else None
            reference = train_model(retain, plan, folder, retrained_name, labels, column, vocabulary)
            references.append(str(reference))
        load = partial(load_original, arguments, plan.auto_class, original)
        origin = origin_of(original, arguments.dataset_name, arguments.license, command, unnamed=DIGITS)
        adapters, processor = lora_config(arguments), type(plan).load_processor(original)
        return cls(load, processor, config, origin, references, arguments.controls, adapters)


def origin_of(model: str, dataset: str | None, licence: str | None, command: str, unnamed: str) -> Origin:
    """How a card names model and data; without a licence the one in the model's own card."""
    card = Path(model) / "README.md"
    if licence is None and model and card.is_file():
        with suppress(ValueError, yaml.YAMLError):  # the card of a stranger
            stated = ModelCard.load(card).data.to_dict().get("license")
            licence = stated if isinstance(stated, str) else None
    named = unnamed if dataset is None else public_name(dataset)
    return Origin(public_name(model), named, dataset is not None and not Path(dataset).exists(), licence, command)


@contextmanager
def job_folder(folder: str | Path, screen: Screen | None = None) -> Iterator[None]:
    """Keep the folder for this job, and the log of `screen` in it.

    When bad input ends it, a folder that holds nothing but this job's log is removed again.

    Raises:
        UNSCError: a folder that cannot be written, or that another job holds.
    """
    existed = Path(folder).exists()
    with reserved(folder):
        try:
            with nullcontext() if screen is None else screen.log_into(folder):
                yield
        except UNSCError:
            left = [path for path in Path(folder).glob("[!.]*") if path.name != LOG]
            if not existed and not left:  # its lock stays, and goes with it
                Path(folder, LOG).unlink(missing_ok=True)
            raise


class UnlearningResult:
    """What a job has made and measured.

    Attributes:
        trainer: holds the unlearned model.
        methods: metrics by model: "original", the controls, "unsc" (or the objective), "retrained".
        table: the same as text, for `print(result.table)`.
        certificate: `Certificate.to_dict()` of the unlearned model.
        verdict, reason: "removed", "suppressed", "not forgotten" or "not judged", and why.
        evaluations: of language models with TOFU's configurations, each model's results; see `unsc evaluate lm`.
        workspace: the trainer's temporary folder, if it has one; it is removed with the result.
    """

    def __init__(self, trainer: UNSCTrainer, run: FinishedRun, stored: StoredRequest | None = None) -> None:
        self.trainer, self._run, self._stored = trainer, run, stored
        self.methods: dict[str, Any] = run.methods
        self.table: Table = run.table
        self.certificate: dict[str, Any] = run.certificate
        self.verdict, self.reason = run.verdict, run.reason
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.workspace: Any = None
        self._saved: tuple[Path, FinishedRun] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The unlearned model."""
        model: PreTrainedModel = self.trainer.unwrapped()
        return model

    def save(self, folder: str | Path, model_name: str | None = None) -> Path:
        """Save model, processor, card, report, pictures and `results.json`. Every process must call this.

        `folder` must not hold a model or a finished run. The card takes its name where there is no `model_name`, a Hub
        id.
        """
        folder = Path(folder)
        check_output_folder(folder)
        self.trainer.accelerator.wait_for_everyone()  # every process has looked before the first one writes
        with nullcontext() if self._stored is None else self._stored.commit(self.trainer):
            if self._stored is not None:
                self._run = replace(self._run, requests=self._stored.requests, budget=self._stored.budget)
            move_model(self.trainer, folder)
            if self.trainer.is_world_process_zero():
                write_evaluations(self.evaluations, folder)
                content = write_run(self._run, folder, model_name)
                self._saved, self.trainer.card_content = (folder, content), content
        self.trainer.accelerator.wait_for_everyone()  # no process leaves before everything is written
        return folder

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | None:
        """Publish what `save` has written, in one commit; see `reporting.hub.publish` for the arguments.

        Every process may call this; the first one publishes and gets the commit.

        Raises:
            UNSCError: the result was not saved, or the Hub refused it.
        """
        if not self.trainer.is_world_process_zero():
            return None
        if self._saved is None:
            raise UNSCError("push_to_hub: the result was not saved yet; call save(folder) first, or give output_dir.")
        folder, content = self._saved
        write_card(replace(content, model_name=repo_id), folder)
        message = "Unlearned by UNSCTrainer"
        return publish(folder, repo_id, private=private, revision=revision, token=token, message=message)

    def deliver(self, config: UNSCConfig) -> None:
        """Save into `output_dir`, and publish if `push_to_hub` says so."""
        phase("Writing model, card and report")
        folder = self.save(str(config.output_dir), config.hub_model_id)
        if config.push_to_hub:
            name, private = config.hub_model_id or folder.resolve().name, config.hub_private_repo
            self.push_to_hub(name, private=private, token=config.hub_token, revision=config.hub_revision)


def finished_run(
    job: Job, trainer: UNSCTrainer, forget: Dataset, task: str, class_names: Sequence[str] = (), **measured: Any
) -> FinishedRun:
    """The plain data of a run, from its job, its trainer, and what the comparison has `measured`."""
    plan, model, adapters = trainer.prepare_unlearning(), trainer.unwrapped(), job.peft_config
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    chosen = {"objective": trainer.args.objective, "pseudo_labels": trainer.goal.pseudo_labels}
    return FinishedRun(
        origin=job.origin,
        task=task,
        model_class=trainer.model_class,
        base_dtype=str(base.dtype).removeprefix("torch."),
        adapter={"r": adapters.r, "alpha": adapters.lora_alpha} if isinstance(adapters, LoraConfig) else None,
        forgotten=list(trainer.task.forgotten_classes),
        class_names=class_names,
        rows=len(forget),
        caveats=trainer.caveats(),
        digest=data_fingerprint(forget)[:16],
        options={**options_of(job.config), **chosen},
        seconds={**plan.seconds, "unlearning": trainer.unlearning_seconds},
        steps=trainer.state.global_step,
        layers=plan.subspace.report(),
        frozen=plan.selection.frozen,
        history=[entry for entry in trainer.state.log_history if "leak" in entry],
        **measured,
    )
