"""A process of its own with the unmodified client: reads one call a line, answers with one line of JSON.

`HF_ENDPOINT` is read when the client is imported, so it must be set before; waits between tries are shortened.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from unsc_hf import UNSCError
from unsc_hf.reporting.hub import publish

_sleep = time.sleep


time.sleep = lambda seconds: _sleep(min(seconds, 0.01))  # type: ignore[assignment]


def _publish(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    try:
        commit = publish(folder, repo_id, **options)
    except UNSCError as error:
        return {"error": str(error)}
    return {"commit": commit.oid}


def _load(name: str, task: str, rows: list[Any], adapter_of: str | None = None) -> dict[str, Any]:
    """Logits of a published model, loaded as anybody would."""
    import torch
    import transformers

    auto = {
        "image": transformers.AutoModelForImageClassification,
        "text": transformers.AutoModelForSequenceClassification,
    }
    model = auto[task].from_pretrained(adapter_of or name)
    if adapter_of:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name)
    with torch.no_grad():
        if task == "image":
            transformers.AutoImageProcessor.from_pretrained(name)
            logits = model.eval()(pixel_values=torch.tensor(rows)).logits
        else:
            tokens = transformers.AutoTokenizer.from_pretrained(name)(rows, return_tensors="pt", padding=True)
            logits = model.eval()(**tokens).logits
    return {"logits": logits.double().tolist()}


def _pipeline(name: str, text: str) -> dict[str, Any]:
    from transformers import pipeline

    return {"answer": pipeline("text-classification", model=name)(text)[0]}


def _rows(name: str) -> dict[str, Any]:
    from datasets import load_dataset

    return {"rows": load_dataset(name, split="train")[:]}


def main() -> None:
    calls = {"publish": _publish, "load": _load, "pipeline": _pipeline, "rows": _rows}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = calls[asked.pop("do")](**asked)
        except BaseException as error:  # the test decides what it means
            answer = {"crash": f"{type(error).__name__}: {error}"}
        print("\x1e" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
