"""Make a language model forget answers, and compare objectives with and without projection, and with retraining.

Any `AutoModelForCausalLM` and data set with a split to forget and one to keep (question and answer, prompt and
completion, or text):

    accelerate launch recipes/unlearn_causal_lm.py \
        --model_name_or_path user/llm --dataset_name user/authors --forget_column author --forget_values 3 \
        --unseen_column author --unseen_values 12 13 14 --output_dir llm-without-author-3

`--objectives unsc npo simnpo gradient_ascent gradient_difference` compares several; the first one's model is
written. LoRA adapters only: `--use_peft --lora_r 8`. Add `--train_original --train_retrained --model_size tiny` to
train a small Llama with a tokenizer of its own (and its reference) from scratch; both are kept for the next run.
"""

from __future__ import annotations

import sys

from unsc_hf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["unlearn", "lm", *sys.argv[1:]]))
