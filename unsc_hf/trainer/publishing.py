"""How a trainer saves, resumes and publishes: no pickles, whole checkpoints, one commit with an honest card."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..config import UNSCConfig
from ..models.loading import load_as
from ..models.older_releases import write_for_older_releases
from ..reporting.finished_run import FinishedRun
from ..reporting.hub import publish
from ..reporting.model_card import write_card
from ..reporting.run_folder import RESULTS
from .checkpoints import mark_checkpoint, unmark_checkpoint


class PublishingTrainer(Trainer):
    """A `Trainer` that leaves and publishes nothing private.

    Attributes:
        card_content: the card of a whole comparison, when a recipe made one; else the card is of this run alone.
    """

    args: UNSCConfig
    card_content: FinishedRun | None = None

    @abstractmethod
    def run_card(self, model_name: str, dataset: str) -> FinishedRun:
        """What the card says of this run alone."""

    @abstractmethod
    def run_identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first one."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As upstream, readable by older releases, and without the pickled arguments, which hold tokens and paths."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        has_card = (folder / "README.md").exists()
        super()._save(output_dir, state_dict)
        (folder / "training_args.bin").unlink(missing_ok=True)
        write_for_older_releases(folder)
        if isinstance(self.model, PeftModel) and not has_card:  # PEFT's own card names the base model's folder
            (folder / "README.md").unlink(missing_ok=True)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the card: of the whole comparison when a recipe made one (`card_content`), else of this run alone.

        Every process must call this: the certificate is measured by all of them, and written by the first.
        """
        name = model_name or Path(str(self.args.output_dir)).resolve().name
        content = self.card_content or self.run_card(name, str(kwargs.get("dataset") or ""))
        if self.is_world_process_zero():
            write_card(content, str(self.args.output_dir))

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Publish model, processor, card, report and pictures in one commit; see `unsc_hf.reporting.hub.publish`.

        Args:
            commit_message, token, revision, private: as upstream; None means `hub_token`, `hub_revision` and
                `hub_private_repo`.
            blocking: there for upstream's signature; the commit is always waited for, so that its failure is seen.
            kwargs: for `create_model_card`.

        Returns:
            The commit, None on all processes but the first.

        Raises:
            UNSCError: something that must not be published, or a refusal of the Hub.
        """
        args, folder = self.args, str(self.args.output_dir)
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if not Path(folder, RESULTS).is_file():  # a finished run is published as it stands
            self.save_model(_internal_call=True)
        repo_id = self.hub_model_id or args.hub_model_id or Path(folder).resolve().name
        self.create_model_card(model_name=repo_id.split("/")[-1], **kwargs)
        if not self.is_world_process_zero():
            return None
        return publish(
            folder,
            repo_id,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            token=token or args.hub_token,
            message=commit_message or f"Unlearned by {type(self).__name__}",
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: the repository is made with the first commit, when there is something to publish."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            unmark_checkpoint(folder)
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            mark_checkpoint(folder, self.run_identity())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read checkpoint weights as `from_pretrained` does.

        Upstream looks tensors up by the names in memory, but `save_pretrained` writes the names of older releases (for
        ViT, for one). It would only warn of missing weights, and the run would go on from the original model.
        """
        if model is not None or isinstance(self.model, PeftModel):  # sharded or adapters: upstream's own path
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_as(type(self.model), resume_from_checkpoint, "resume_from_checkpoint")
        self.model.load_state_dict(saved.state_dict())
