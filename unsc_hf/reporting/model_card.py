"""The model card: what was forgotten, how, what it cost, and what is claimed, rendered from a run's results."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.verdict import MethodResult, format_table
from ..objectives import OBJECTIVES
from ..utils.files import write_text

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"


TAGS = ["unsc", "machine-unlearning", "unlearning"]


_RELABELLING = {
    "top1": "each forgotten row is re-labelled with the most similar class that remains",
    "second": "each forgotten row is re-labelled with the second most similar class that remains",
    "soft": "each forgotten row is re-labelled with the original's distribution over what remains, most of it on the most similar",
    "random": "each forgotten row is re-labelled at random",
    "nearest_mean": "each forgotten row is re-labelled with the remaining class whose mean is nearest",
    "matched": "each forgotten row is re-labelled to be known as well as rows are that the original never saw",
    "left_out": "each forgotten row is re-labelled to be known as well as equally hard rows are that the original never saw",
}


# What loads a model of each task: its class, and the class and name of what prepares its inputs.
LOADERS = {
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor", "processor"),
    "text-classification": ("AutoModelForSequenceClassification", "AutoTokenizer", "tokenizer"),
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer"),
}


_NAMES_ROWS = ("forget_indices", "forget_values")  # options whose values tell which rows, or whose, were forgotten


_PACKAGES = ("unsc_hf", "torch", "transformers", "datasets", "accelerate", "peft", "huggingface_hub")


_ADAPTER_NOTE = (
    "This is an adapter. The base model still remembers: whoever loads it without the adapter has everything back. Where "
    "that matters, merge the adapter in float32 and publish the merged model instead."
)


@dataclass
class CardContent:
    """What a card is rendered from.

    Attributes:
        model_name: name of the unlearned model.
        base_model: Hub id or folder name of the original.
        model_class: class that loads the model, for "How to use".
        adapter: whether only a LoRA adapter is published.
        base_dtype: precision of the base model under the adapter.
        task: the Hub's name of what the model does; a key of `LOADERS`.
        forgotten: names of the forgotten classes.
        forgotten_rows: number of forgotten rows.
        forgotten_digest: beginning of a hash over them, where no classes can be named.
        dataset: Hub id or name of the data set.
        dataset_on_hub: whether `dataset` is a Hub id, to be linked.
        methods: comparison, empty when none was made.
        table: comparison as text cells, first the header, where it is not one of classifiers.
        written: first cell of the row that the card is about.
        references: number of retrained models behind the row "retrained".
        certificate: `Certificate.to_dict()`, or None.
        verdict, reason: as `comparison.judge` says.
        hyperparameters: options by name.
        pictures: (file name, caption).
        report: file name of the HTML report beside the card, or "".
        license: SPDX id, or None if unknown.
        requests: log of all requests served on this model, oldest first (see `requests.record_request`).
        command: what was typed, already scrubbed.
    """

    model_name: str
    base_model: str
    model_class: str
    forgotten: Sequence[str]
    forgotten_rows: int
    dataset: str
    dataset_on_hub: bool = False
    methods: dict[str, MethodResult] = field(default_factory=dict)
    references: int = 0
    certificate: dict[str, Any] | None = None
    verdict: str = "not judged"
    reason: str = "no comparison was made"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    pictures: Sequence[tuple[str, str]] = ()
    report: str = ""
    license: str | None = None
    command: str = ""
    adapter: bool = False
    base_dtype: str = "float32"
    forgotten_digest: str = ""
    table: Sequence[Sequence[str]] = ()
    written: str = "UNSC"
    requests: Sequence[dict[str, Any]] = ()
    task: str = "image-classification"


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, and Python's."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def public_name(name: str) -> str:
    """A Hub id as it is, a local folder by its last part: cards must not tell paths of this machine."""
    path = Path(name).expanduser()
    local = path.exists() or path.is_absolute() or name.startswith((".", "~"))
    return path.resolve().name if name and local else name


def scrubbed_command(arguments: Sequence[str]) -> str:
    """A command line without secrets, without what names rows to forget, and without folders of this machine.

    Paths keep their last part only.
    """
    shown: list[str] = []
    hide = ""  # the option whose values are not shown
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            option = name[2:].lower().replace("-", "_")
            hide = option if "token" in option or option in _NAMES_ROWS else ""
            if hide and equals:
                shown.append(f"{name}=***")
            else:
                shown.append(f"{name}={_last_part(value)}" if equals else name)
        elif hide:
            if shown[-1] != "***":
                shown.append("***")
            hide = hide if hide in _NAMES_ROWS else ""  # a token is one value, rows may be many
        else:
            shown.append(_last_part(argument))
    return shlex.join(shown)


def typed_command() -> str:
    """The command that runs this recipe, or `unsc`, as `scrubbed_command` shows it."""
    program = Path(sys.argv[0]).name
    start = ["unsc"] if program in ("unsc", "unsc.exe") else ["python", f"recipes/{program}"]
    return scrubbed_command([*start, *sys.argv[1:]])


def _last_part(text: str) -> str:
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or text.startswith(("..", "~")) else text


def escape(text: Any) -> str:
    """Text from outside (class names, model names) as inert Markdown: no markup, no HTML, no table breaks."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$<>])", r"\\\1", plain)


def _forgotten_text(content: CardContent) -> str:
    names = [str(name) for name in content.forgotten]
    rows = f"{content.forgotten_rows:,} training rows"
    if not names:
        digest = f"; their hash begins with {content.forgotten_digest}" if content.forgotten_digest else ""
        return f"{rows} (not listed{digest})."
    if len(names) <= 20:
        return f"{rows} of {'class' if len(names) == 1 else 'classes'} {', '.join(escape(name) for name in names)}."
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
    return f"{rows} of {len(names)} classes (SHA-256 of their sorted names begins with {digest})."


def _markdown_table(rows: Sequence[Sequence[str]], written: str) -> str:
    header, *body = rows
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(f"**{c}**" if row[0] == written else c for c in row) + " |" for row in body]
    return "\n".join(lines)


def _adapter_note(content: CardContent) -> str:
    """What a reader of an adapter's card must know."""
    if not content.adapter:
        return ""
    if content.base_dtype == "float32":
        return _ADAPTER_NOTE
    return f"{_ADAPTER_NOTE} It was unlearned on the base model in {content.base_dtype}, and what is certified below holds for it loaded so."


def _usage(content: CardContent) -> str:
    repo = json.dumps(content.model_name)  # double quotes, as formatters want them
    auto_class, processor_class, processor = LOADERS[content.task]
    if content.adapter:
        dtype = "" if content.base_dtype == "float32" else f", dtype={json.dumps(content.base_dtype)}"
        return (
            "from peft import PeftModel\n"
            f"from transformers import {auto_class}, {processor_class}\n\n"
            f"base = {auto_class}.from_pretrained({json.dumps(content.base_model)}{dtype})\n"
            f"model = PeftModel.from_pretrained(base, {repo})\n"
            f"{processor} = {processor_class}.from_pretrained({repo})"
        )
    return (
        f"from transformers import {processor_class}, {content.model_class}\n\n"
        f"model = {content.model_class}.from_pretrained({repo})\n"
        f"{processor} = {processor_class}.from_pretrained({repo})"
    )


def _certificate_fields(certificate: dict[str, Any]) -> dict[str, Any]:
    per_layer = certificate["leak_per_layer"]
    worst = max(per_layer, key=lambda name: per_layer[name]) if per_layer else ""
    drift = certificate["drift"]
    return {
        "rows": f"{certificate['rows']:,}",
        "held_out": certificate["held_out"],
        "leak": f"{certificate['leak']:.3g}",
        "worst_layer": worst,
        "worst_leak": f"{per_layer.get(worst, 0.0):.3g}",
        "max_leak": "none" if certificate["max_leak"] is None else f"{certificate['max_leak']:.3g}",
        "drift_relative": f"{drift['relative']:.3g}",
        "drift_largest": f"{drift['largest']:.3g}",
        "agreement": f"{drift['agreement']:.2%}",
        "relative_change": f"{certificate['relative_change']:.3g}",
        "merged": [
            (name, f"{drift['relative']:.3g}", f"{drift['agreement']:.2%}")
            for name, drift in (certificate.get("merged") or {}).items()
        ],
        "stop_reason": {
            "target": "reaching its target",
            "leak_budget": "the leak budget",
            "max_steps": "the step limit",
        }.get(certificate["stop_reason"], str(certificate["stop_reason"])),
    }


def _eval_results(content: CardContent) -> list[EvalResult]:
    unsc = content.methods.get("unsc")
    if unsc is None:
        return []
    metrics = (
        ("AccDut", "accuracy", "test", unsc.AccDut, "AccDut: accuracy on the forgotten classes"),
        ("AccDrt", "accuracy", "test", unsc.AccDrt, "AccDrt: accuracy on the remaining classes"),
        ("AccDf", "accuracy", "train", unsc.AccDf, "AccDf: accuracy on forgotten training rows"),
        ("AccDr", "accuracy", "train", unsc.AccDr, "AccDr: accuracy on retained training rows"),
    )
    return [
        EvalResult(
            task_type=content.task,
            task_name=f"{content.task.replace('-', ' ').capitalize()} after unlearning",
            dataset_type=content.dataset,
            dataset_name=content.dataset,
            dataset_split=split,
            metric_type=kind,
            metric_name=text,
            metric_value=round(value, 4),
        )
        for _, kind, split, value, text in metrics
        if value is not None
    ]


def build_card(content: CardContent) -> ModelCard:
    """Render the card; class and model names are escaped, so they can break neither YAML nor Markdown nor the template."""
    results = _eval_results(content)
    data = ModelCardData(
        base_model=content.base_model or None,
        base_model_relation=("adapter" if content.adapter else "finetune") if content.base_model else None,
        license=content.license or "unknown",
        library_name="peft" if content.adapter else "transformers",
        pipeline_tag=content.task,
        tags=TAGS,
        datasets=[content.dataset] if content.dataset_on_hub else None,
        model_name=content.model_name.split("/")[-1],
        eval_results=results or None,
    )
    methods = content.methods
    objective = str(content.hyperparameters.get("objective") or "unsc")
    references = (
        f"The row retrained is the mean of {content.references} models."
        if content.references > 1
        else "The row retrained is one model trained without the forgotten data."
        if content.references == 1
        else "No retrained model was given, so no claim beyond *suppressed* is possible."
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=escape(content.model_name.split("/")[-1]),
        summary=(
            f"{escape(content.base_model or 'A classifier')} after machine unlearning on {escape(content.dataset)} "
            "with [unsc_hf](https://arxiv.org/abs/2404.13588)."
        ),
        verdict=content.verdict,
        verdict_reason=escape(content.reason[:1].upper() + content.reason[1:]) + ".",
        report=content.report,
        adapter_note=_adapter_note(content),
        forgotten=_forgotten_text(content),
        table=_markdown_table(format_table(methods) if methods else content.table, content.written)
        if methods or content.table
        else "",
        classifier=content.task != "text-generation",
        references_note=references,
        relabelling=_RELABELLING.get(str(content.hyperparameters.get("pseudo_labels")), _RELABELLING["top1"]),
        objective=escape(objective),
        reads_retained=objective in OBJECTIVES and OBJECTIVES[objective].retain,
        requests=[
            (entry["time"], f"{entry['rows']:,}", entry["digest"], entry["salt"], f"{entry['leak']:.3g}")
            for entry in content.requests
        ],
        pictures=[{"file": file, "caption": caption} for file, caption in content.pictures],
        certificate=_certificate_fields(content.certificate) if content.certificate else None,
        usage=_usage(content),
        hyperparameters=[(escape(name), escape(value)) for name, value in content.hyperparameters.items()],
        command=content.command.replace("```", ""),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def write_card(content: CardContent, folder: str | Path) -> Path:
    """Write `README.md` into `folder`, whole or not at all."""
    path = Path(folder) / "README.md"
    write_text(path, str(build_card(content)))
    return path
