"""`UnlearningResult`: a finished job, which can be looked at, saved and published."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from ..errors import UNSCError
from ..reporting.finished_run import FinishedRun
from ..reporting.hub import publish
from ..reporting.model_card import write_card
from ..reporting.results import options_of, print_run, write_run
from ..reporting.run_folder import check_output_folder, move_model
from ..reporting.tables import Table
from ..trainer.sequence import StoredRequest
from ..trainer.trainer import UNSCTrainer
from ..utils.fingerprint import data_fingerprint
from .examiner import write_evaluations
from .job import Job


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

        Args:
            folder: must not hold a model or a finished run.
            model_name: Hub id for the card; the folder's name when None.
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

    def deliver(self, job: Job) -> None:
        """Save into `output_dir`, print the summary, and publish if `push_to_hub` says so."""
        config = job.config
        folder = self.save(str(config.output_dir), config.hub_model_id)
        if self.trainer.is_world_process_zero():
            print_run(self._run, job.console)
            job.console.print(f"Model, card, pictures and results: {config.output_dir}")
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
        digest=data_fingerprint(forget)[:16],
        options={**options_of(job.config), **chosen},
        seconds={**plan.seconds, "unlearning": trainer.unlearning_seconds},
        steps=trainer.state.global_step,
        layers=plan.subspace.report(),
        frozen=plan.selection.frozen,
        unreachable=plan.selection.unprotectable(),
        history=[entry for entry in trainer.state.log_history if "leak" in entry],
        **measured,
    )
