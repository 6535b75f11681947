"""Named studies of what null-space calibration depends on; each writes JSON, a picture and one paragraph.

All studies on the embedded handwritten digits:

    python recipes/ablate.py image --output_dir outputs/studies

Some of them on a data set and models of your own, one original for each seed:

    python recipes/ablate.py image --studies rank first-order --dataset_name user/fashion-mnist --forget_classes Shirt \
        --originals model-seed0 model-seed1 model-seed2 --output_dir outputs/studies

`text` instead of `image` for text classifiers. A stopped study goes on when the same command is given again. Studies: null-space,
pseudo-labels, rank, calibration, first-order, many-classes, requests, poison, features; `--help` after `image` or `text` lists all options.
"""

from __future__ import annotations

import sys

from rich.console import Console

from unsc_hf.cli.arguments import run_recipe
from unsc_hf.cli.main import ablate


def main() -> None:
    ablate(sys.argv[1:], Console())


if __name__ == "__main__":
    run_recipe(main)
