"""Publish a finished run on the Hub, in one commit and without anything private; a second try does nothing twice.

    python recipes/push.py outputs/vit-without-shirt --hub_model_id user/vit-without-shirt --hub_private_repo

Private is recommended until somebody has read the report. The token comes from `hf auth login`, HF_TOKEN, or
--hub_token.
"""

from __future__ import annotations

import sys

from unsc_hf.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["push", *sys.argv[1:]]))
