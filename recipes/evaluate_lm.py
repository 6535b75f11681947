"""Evaluate a language model as TOFU does: forget quality, model utility, memorisation and membership.

Any causal language model or adapter, and a data set with configurations as TOFU is published:

    accelerate launch recipes/evaluate_lm.py \
        --model_name_or_path user/unlearned --dataset_name locuslab/TOFU --forget_config forget10 \
        --retain_config retain90 --unseen_config holdout10 --retain_logs retrained/TOFU_EVAL.json \
        --output_dir evaluation

The files have open-unlearning's shape; retain logs may be open-unlearning's own.
"""

from __future__ import annotations

import sys

from unsc_hf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", "lm", *sys.argv[1:]]))
