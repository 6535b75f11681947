"""A process of its own with the unmodified client: reads one call a line, answers with one line of JSON.

The client reads `HF_ENDPOINT` when it is imported, so it must be set before. Its waits between tries are shortened.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from peft import PeftModel

from unsc_hf import UNSCError
from unsc_hf.reporting.hub import publish

_AUTO = {
    "image": (transformers.AutoModelForImageClassification, transformers.AutoImageProcessor),
    "text": (transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer),
}

_sleep = time.sleep


def _publish(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    try:
        commit = publish(folder, repo_id, **options)
    except UNSCError as error:
        return {"error": str(error)}
    return {"commit": commit.oid}


def _load(name: str, task: str, rows: list[Any], adapter_of: str | None = None) -> dict[str, Any]:
    """Logits of a published model, loaded as anybody would."""
    model_class, processor_class = _AUTO[task]
    model = model_class.from_pretrained(adapter_of or name)
    if adapter_of:
        model = PeftModel.from_pretrained(model, name)
    processor = processor_class.from_pretrained(name)
    inputs = (
        {"pixel_values": torch.tensor(rows)} if task == "image" else processor(rows, return_tensors="pt", padding=True)
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    return {"logits": logits.double().tolist()}


def _pipeline(name: str, text: str) -> dict[str, Any]:
    return {"answer": transformers.pipeline("text-classification", model=name)(text)[0]}


def main() -> None:
    time.sleep = lambda seconds: _sleep(min(seconds, 0.01))  # type: ignore[assignment]
    calls = {"publish": _publish, "load": _load, "pipeline": _pipeline}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        try:
            answer = calls[options.pop("call")](**options)
        except BaseException as error:  # the test decides what it means
            answer = {"crash": f"{type(error).__name__}: {error}"}
        print("\x1e" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
