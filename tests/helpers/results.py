"""Results as a finished run has them."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from unsc_hf.evaluation.verdict import MethodResult
from unsc_hf.reporting.model_card import CardContent


def method_result(**values: float | None) -> MethodResult:
    fields = dict.fromkeys(
        (
            "AccDf",
            "AccDr",
            "AccDut",
            "AccDrt",
            "mia_auc",
            "mia_tpr_at_1pct_fpr",
            "probe_forget",
            "prototype_attack_10",
            "leak",
            "seconds",
        )
    )
    return MethodResult(**{**fields, "AccDut": 0.0, **values}, per_class={0: 0.5, 1: 1.0})


CERTIFICATE = {
    "leak": 0.012,
    "leak_per_layer": {"a.b": 0.01, "c.d": 0.02},
    "drift": {"relative": 0.1, "largest": 2.0, "agreement": 0.99},
    "rows": 900,
    "relative_change": 0.3,
    "max_leak": 0.05,
    "stop_reason": "target",
    "held_out": True,
}


def card_content(**changes: object) -> CardContent:
    base = {
        "model_name": "user/vit-without-shirt",
        "base_model": "user/vit",
        "model_class": "ViTForImageClassification",
        "forgotten": ["Shirt"],
        "forgotten_rows": 6000,
        "dataset": "user/fashion",
        "dataset_on_hub": True,
        "methods": {"original": method_result(AccDut=0.6, AccDrt=0.9), "unsc": method_result(AccDut=0.0, AccDrt=0.91)},
        "references": 0,
        "certificate": CERTIFICATE,
        "verdict": "suppressed",
        "reason": "saying more needs at least three retrained models, 0 given",
        "hyperparameters": {"energy": 0.99, "learning_rate": 3e-4},
        "pictures": [("unlearning.png", "Accuracy and leak while unlearning")],
        "license": "mit",
        "command": "python recipes/unlearn_vit.py --energy 0.99",
    }
    return CardContent(**{**base, **changes})  # type: ignore[arg-type]


def _png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def _method(**changes: float) -> dict[str, Any]:
    return {"AccDut": 0.0, "AccDrt": 0.9, "AccDf": 0.0, "probe_forget": 0.6, **changes}


def run_results(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "request": {"forget_classes": ["Shirt"], "rows": 6000, "dataset": "user/fashion", "model": "user/vit"},
        "verdict": {"word": "suppressed", "reason": "two models only"},
        "methods": {"original": _method(AccDut=0.64), "unsc": _method(AccDrt=0.92), "random_projector": _method()},
        "table": [["model", "AccDut"], ["original", "64.0"], ["UNSC", "0.0"]],
        "table_note": "Percent.",
        "certificate": {
            "leak": 0.012,
            "leak_per_layer": {"a.b": 0.01, "c.d": 0.02},
            "drift": {"relative": 0.1, "largest": 2.0, "agreement": 0.99},
            "rows": 900,
            "relative_change": 0.3,
            "max_leak": 0.05,
            "stop_reason": "target",
            "held_out": True,
            "merged": {"bfloat16": {"relative": 0.2, "largest": 1.0, "agreement": 0.9}},
        },
        "seconds": {"statistics": 3.0, "unlearning": 9.4},
        "steps": 75,
        "history": [{"forget_accuracy": 0.6, "forget_loss": 1.0}, {"forget_accuracy": 0.0, "forget_loss": 3.0}],
        "requests": [],
        "hyperparameters": {"energy": 0.99},
        "pictures": [["unlearning.png", "Accuracy and leak"], ["gone.png", "not there"]],
        "command": "python recipes/unlearn_vit.py",
        "versions": {"python": "3.11"},
    }
    return {**base, **changes}
