"""Options of `unsc evaluate lm` and `unsc audit lm`, and the rows that they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers.hf_argparser import HfArg

from ..comparison.arguments import LanguageArguments
from ..comparison.experiment import check_names
from ..data.copies import copies
from ..data.dialogues import DEFAULT_TEMPLATE, PromptFormat, to_dialogues
from ..data.sources import config_names, load_config, load_data
from ..errors import UNSCError
from ..evaluation.language.tofu import METRICS

_DTYPES = ("float32", "bfloat16", "float16")
_ASKED = ["question", "answer"]
_PUBLISHED = {"ra": "real_authors", "wf": "world_facts"}  # sets of TOFU beside those that options name


# Options that mean the same when a model is unlearned.
_SHARED = (
    "dataset_name", "forget_config", "retain_config", "unseen_config", "forget_split", "retain_split", "cache_dir",
)  # fmt: skip


def _same(name: str) -> Any:
    """An option as `LanguageArguments` declares it."""
    declared = LanguageArguments.__dataclass_fields__[name]
    return field(default=declared.default, metadata=declared.metadata)


@dataclass
class ExaminedArguments:
    """Which language model is examined, and on what. Of configurations, NAME_perturbed is read where it exists."""

    model_name_or_path: str | None = HfArg(default=None, help="The model, or an adapter: a Hub id or folder.")
    dataset_name: str | None = _same("dataset_name")
    forget_config: str | None = _same("forget_config")
    retain_config: str | None = _same("retain_config")
    unseen_config: str | None = _same("unseen_config")
    forget_split: str | None = _same("forget_split")
    retain_split: str | None = _same("retain_split")
    unseen_split: str | None = HfArg(default=None, help="Split of rows no model was trained on.")
    cache_dir: str | None = _same("cache_dir")
    prompt_template: str | None = _same("prompt_template")
    system_prompt: str | None = _same("system_prompt")
    chat_template_kwargs: str | None = _same("chat_template_kwargs")
    per_device_eval_batch_size: int = HfArg(default=16, help="Rows at a time, in one process.")
    max_new_tokens: int = HfArg(default=200, help="Longest answer.")
    model_dtype: str = HfArg(default="float32", help="Precision of the models.", metadata={"choices": list(_DTYPES)})
    use_cpu: bool = HfArg(default=False, help="Do not use an accelerator.")
    disable_tqdm: bool = HfArg(default=False, help="Show no progress bars.")

    def __post_init__(self) -> None:
        for name in ("per_device_eval_batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UNSCError(f"{name}: got {getattr(self, name)}; choose a whole number of 1 or more.")
        if self.model_dtype not in _DTYPES:
            raise UNSCError(f"model_dtype: got {self.model_dtype!r}; choose from {', '.join(_DTYPES)}.")

    def sets(self, refuse_overlap: bool = True) -> dict[str, Dataset]:
        """Rows by the names that metrics use.

        Raises:
            UNSCError: a configuration or split that does not exist, or rows that are to be forgotten and kept.
        """
        if self.dataset_name is None:
            raise UNSCError("dataset_name: not given; name a Hub id or local folder, such as locuslab/TOFU.")
        if self.forget_config is None and self.forget_split is None:
            muse = self._from_muse()
            if muse:
                return muse
        for kind in ("forget", "retain"):
            if getattr(self, f"{kind}_config") is None and getattr(self, f"{kind}_split") is None:
                raise UNSCError(f"{kind}_config: not given; name a configuration, or a split by {kind}_split.")
        sets = self._from_configs(refuse_overlap) if self.forget_config is not None else self._from_splits()
        if refuse_overlap:
            _refuse_overlap(sets["forget"], sets["retain"])
        return sets

    def _from_configs(self, refuse_overlap: bool) -> dict[str, Dataset]:
        name, known = str(self.dataset_name), config_names(str(self.dataset_name))
        sets: dict[str, Dataset] = {}
        for part in ("forget", "retain", "unseen"):
            config, argument = getattr(self, f"{part}_config"), f"{part}_config"
            if config is None:
                continue
            if config not in known:
                raise UNSCError(f"{argument}: no configuration {config!r} in {name!r}; choose from {', '.join(known)}.")
            if part == "retain" and refuse_overlap:
                _refuse_overlap(sets["forget"], load_config(name, config, argument, self.retain_split, self.cache_dir))
            perturbed = {"forget": f"{config}_perturbed", "retain": "retain_perturbed"}.get(part)
            chosen = perturbed if perturbed in known else config
            split = getattr(self, f"{part}_split")
            key = "holdout" if part == "unseen" else part
            sets[key] = load_config(name, str(chosen), argument, split, self.cache_dir)
        for key, base in _PUBLISHED.items():
            config = next((config for config in (f"{base}_perturbed", base) if config in known), None)
            if config is not None:
                sets[key] = load_config(name, config, "dataset_name", cache_dir=self.cache_dir)
        return sets

    def _from_muse(self) -> dict[str, Dataset]:
        """MUSE's texts to continue, questions after its examples, and texts of the membership attack; {} elsewhere."""
        name = str(self.dataset_name)
        if not {"verbmem", "knowmem", "privleak"} <= set(config_names(name)):
            return {}

        def load(config: str, split: str) -> Dataset:
            return load_config(name, config, "dataset_name", split, self.cache_dir)

        sets = {"forget": load("privleak", "forget"), "holdout": load("privleak", "holdout")}
        sets["forget_verbmem"] = to_dialogues(load("verbmem", "forget"))
        for part in ("forget", "retain"):
            examples = [PromptFormat().row(**row) for row in load("knowmem", f"{part}_qa_icl").select_columns(_ASKED)]
            shown = "".join(f"{row['prompt']}{row['completion']}\n\n" for row in examples)
            asked = PromptFormat(shown + DEFAULT_TEMPLATE)
            sets[f"{part}_knowmem"] = to_dialogues(load("knowmem", f"{part}_qa").select_columns(_ASKED), asked)
        return sets

    def _from_splits(self) -> dict[str, Dataset]:
        loaded = load_data(str(self.dataset_name), cache_dir=self.cache_dir)
        sets = {key: loaded[base] for key, base in _PUBLISHED.items() if base in loaded}
        for part, key in (("forget", "forget"), ("retain", "retain"), ("unseen", "holdout")):
            split = getattr(self, f"{part}_split")
            if split is None:
                continue
            if split not in loaded:
                raise UNSCError(
                    f"{part}_split: no split {split!r} in {self.dataset_name!r}; splits found: "
                    f"{', '.join(sorted(loaded))}."
                )
            sets[key] = loaded[split]
        return sets


@dataclass
class EvaluationArguments(ExaminedArguments):
    """Which metrics of a language model are computed."""

    retain_logs: str | None = HfArg(default=None, help="TOFU_EVAL.json of a model trained without the forgotten rows.")
    reference_model: str | None = HfArg(default=None, help="Model of the reference attack: a Hub id or folder.")
    metrics: list[str] | None = HfArg(default=None, help="Metrics to compute; all of TOFU's by default.")
    overwrite: bool = HfArg(default=False, help="Begin anew where output_dir holds an evaluation.")
    output_dir: str = HfArg(default="outputs/evaluation", help="Where the results are written.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("metrics", self.metrics, METRICS)


def _refuse_overlap(forget: Dataset, retain: Dataset) -> None:
    """Raise UNSCError where rows are to be forgotten and kept."""
    if {"question", "answer"} <= set(forget.column_names) & set(retain.column_names):
        shared = int(copies(retain, forget).sum())
        if shared:
            raise UNSCError(
                f"retain_config: {shared} of its rows are in the forget set too; name rows to keep that are not "
                "forgotten."
            )


def evaluation_arguments(arguments: LanguageArguments) -> EvaluationArguments:
    """How the models of an unlearning job are evaluated: on the configurations that the job names."""
    return EvaluationArguments(**{name: getattr(arguments, name) for name in _SHARED})
