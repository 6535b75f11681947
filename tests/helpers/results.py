"""Results as a finished run has them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from unsc_hf.evaluation.verdict import MethodResult
from unsc_hf.reporting.finished_run import FinishedRun, Origin
from unsc_hf.reporting.tables import classifier_table

CERTIFICATE: dict[str, Any] = {
    "leak": 0.012,
    "leak_per_layer": {"a.b": 0.01, "c.d": 0.02},
    "drift": {"relative": 0.1, "largest": 2.0, "agreement": 0.99},
    "flips": 3,
    "upper_95": 0.0077,
    "network_leak": 0.09,
    "amplification": 3.0,
    "max_flips": 0.1,
    "rows": 900,
    "relative_change": 0.3,
    "max_leak": 0.05,
    "stop_reason": "target",
    "held_out": True,
}


def method_result(**values: float | None) -> MethodResult:
    """A row of the comparison; what is not given was not measured, except AccDut."""
    fields = dict.fromkeys(name for name in MethodResult.__dataclass_fields__ if name != "per_class")
    return MethodResult(**{**fields, "AccDut": 0.0, **values}, per_class={0: 0.5, 1: 1.0})


def finished_run(
    forgotten: Sequence[str] = ("Shirt",),
    base_model: str = "user/vit",
    command: str = "python recipes/unlearn_vit.py --energy 0.99",
    **changes: Any,
) -> FinishedRun:
    """A run that went well."""
    methods = {"original": method_result(AccDut=0.6, AccDrt=0.9), "unsc": method_result(AccDut=0.0, AccDrt=0.91)}
    run: dict[str, Any] = {
        "origin": Origin(base_model, "user/fashion", True, "mit", command),
        "model_class": "ViTForImageClassification",
        "rows": 6000,
        "forgotten": range(len(forgotten)),
        "class_names": forgotten,
        "model_name": "user/vit-without-shirt",
        "methods": methods,
        "table": classifier_table(methods),
        "certificate": CERTIFICATE,
        "verdict": "suppressed",
        "reason": "saying more needs at least three retrained models, 0 given",
        "options": {"energy": 0.99, "learning_rate": 3e-4},
        "pictures": [("unlearning.png", "Accuracy and leak while unlearning")],
    }
    return FinishedRun(**{**run, **changes})


def png_bytes() -> bytes:
    """A picture of one pixel."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def accuracies(**changes: float) -> dict[str, float]:
    """What `results.json` holds of one model."""
    return {"AccDut": 0.0, "AccDrt": 0.9, "AccDf": 0.0, "probe_forget": 0.6, **changes}


_HEADER = ["model", "accuracy on forgotten", "accuracy on kept", "decisions changed", "readable by a probe"]


def run_results(**changes: Any) -> dict[str, Any]:
    """What `results.json` holds of a run that went well."""
    results: dict[str, Any] = {
        "request": {"forget_classes": ["Shirt"], "rows": 6000, "dataset": "user/fashion", "model": "user/vit"},
        "verdict": {"word": "suppressed", "reason": "two models only"},
        "methods": {
            "original": accuracies(AccDut=0.64), "unsc": accuracies(AccDrt=0.92), "random_projector": accuracies(),
        },
        "table": [_HEADER, ["original", "64 %", "90 %", "0 %", "60 %"], ["UNSC", "0 %", "92 %", "1.3 %", "60 %"]],
        "table_note": "Accuracies are means.",
        "certificate": {**CERTIFICATE, "merged": {"bfloat16": {"relative": 0.2, "largest": 1.0, "agreement": 0.9}}},
        "seconds": {"statistics": 3.0, "unlearning": 9.4},
        "steps": 75,
        "history": [{"forget_accuracy": 0.6, "forget_loss": 1.0}, {"forget_accuracy": 0.0, "forget_loss": 3.0}],
        "requests": [],
        "hyperparameters": {"energy": 0.99},
        "pictures": [["unlearning.png", "Accuracy and leak"], ["gone.png", "not there"]],
        "command": "python recipes/unlearn_vit.py",
        "versions": {"python": "3.11"},
    }  # fmt: skip
    return {**results, **changes}
