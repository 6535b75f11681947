"""Named studies of what null-space calibration depends on; each writes JSON, a picture and two sentences.

All studies on the embedded handwritten digits:

    python recipes/ablate.py image --output_dir outputs/studies

Some of them on a data set and models of your own, one original for each seed:

    python recipes/ablate.py image --studies rank first-order --dataset_name user/fashion-mnist --forget_classes Shirt \
        --originals model-seed0 model-seed1 model-seed2 --output_dir outputs/studies

`text` instead of `image` for text classifiers. A stopped study goes on when the same command is given again.
Studies: null-space, pseudo-labels, rank, calibration, first-order, many-classes, requests, poison;
`--help` after `image` or `text` lists all options.
"""

from __future__ import annotations

import sys

from unsc_hf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["ablate", *sys.argv[1:]]))
