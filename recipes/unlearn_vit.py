"""Make an image classifier forget classes, and compare the result with retraining and trivial controls.

The embedded quickstart (handwritten digits, a few minutes on a CPU, no download):

    accelerate launch recipes/unlearn_vit.py

Any `AutoModelForImageClassification` and data set (Hub id, parquet, imagefolder):

    accelerate launch recipes/unlearn_vit.py \
        --model_name_or_path user/vit-fashion --dataset_name user/fashion --forget_classes Shirt Coat \
        --retrained_model_name_or_path user/vit-fashion-without-shirt-coat --output_dir vit-without-shirt-coat

Add `--train_original --train_retrained --model_size tiny` to train what is missing; it is kept for the next run.
`--config file.yaml` reads any option from a file. `--help` lists all.
"""

from __future__ import annotations

import sys

from unsc_hf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["unlearn", "image", *sys.argv[1:]]))
