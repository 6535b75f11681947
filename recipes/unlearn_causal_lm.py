"""Make a language model forget answers, and compare objectives with and without projection, and with retraining.

Any `AutoModelForCausalLM` and data set with a split to forget and one to keep (question and answer, prompt and completion,
or text):

    accelerate launch recipes/unlearn_causal_lm.py \
        --model_name_or_path user/llm --dataset_name user/authors --forget_column author --forget_values 3 \
        --unseen_column author --unseen_values 12 13 14 --output_dir llm-without-author-3

`--objectives unsc npo simnpo gradient_ascent gradient_difference` compares several; the first one's model is written.
LoRA adapters only: `--use_peft --lora_r 8`. Add `--train_original --train_retrained --model_size tiny` to train a small Llama
with a tokenizer of its own (and its reference) from scratch; both are kept for the next run.
"""

from __future__ import annotations

from unsc_hf import UNSCConfig
from unsc_hf.cli.arguments import fill_output_dir, parse_arguments, run_recipe
from unsc_hf.cli.main import LANGUAGE_DEFAULTS
from unsc_hf.comparison.language_unlearning import LanguageArguments, run


def main() -> None:
    arguments, config = parse_arguments(
        (LanguageArguments, UNSCConfig), description=__doc__ or "", defaults=LANGUAGE_DEFAULTS
    )
    fill_output_dir(config, "unlearned-language-model")
    run(arguments, config)


if __name__ == "__main__":
    run_recipe(main)
