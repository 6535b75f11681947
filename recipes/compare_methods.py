"""Compare methods of unlearning on one data set: same models, seeds and stopping rule, audited beside retrained models.

The embedded handwritten digits:

    python recipes/compare_methods.py image --output_dir outputs/compare-digits

A data set and models of your own, one original for each seed:

    python recipes/compare_methods.py image --dataset_name user/fashion-mnist --forget_classes Shirt \
        --originals model-seed0 model-seed1 model-seed2 --retrained_model_name_or_path retrained-seed0 retrained-seed1 \
        --methods unsc random_label scrub --output_dir outputs/compare

`text` instead of `image` for text classifiers. `--train_original --train_retrained --model_size tiny` trains what
is missing. `--jobs 2` spreads the work over two processes of one thread each. A stopped comparison goes on when the
same command is given again. `--help` after `image` or `text` lists all options.
"""

from __future__ import annotations

import sys

from unsc_hf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["compare", *sys.argv[1:]]))
