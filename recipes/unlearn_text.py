"""Make a text classifier forget classes or rows, and compare the result with retraining and trivial controls.

Any `AutoModelForSequenceClassification` and data set (Hub id, parquet, CSV, JSON):

    accelerate launch recipes/unlearn_text.py \
        --model_name_or_path user/bert-intents --dataset_name user/intents --forget_classes balance transfer \
        --retrained_model_name_or_path user/bert-without-both --output_dir bert-without-balance-transfer

Rows instead of classes: `--forget_indices 3 14 15`, `--forget_indices rows.txt`, or
`--forget_column user --forget_values u42`. LoRA adapters only: `--use_peft --lora_r 8`. Add
`--train_original --train_retrained --model_size tiny` to train a small BERT (and its reference) from scratch; both are
kept for the next run. `--config file.yaml` reads any option from a file.
"""

from __future__ import annotations

import sys

from unsc_hf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["unlearn", "text", *sys.argv[1:]]))
