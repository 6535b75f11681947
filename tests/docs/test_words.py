"""The counts of `tools/words.py`, and the limits that `make lint` holds the pages to."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = runpy.run_path(str(ROOT / "tools" / "words.py"))


def test_code_links_and_directives_are_not_prose() -> None:
    page = (
        "# Two words\n\nA [link](https://x.y/z.html) counts once. So does `this code here`!\n\n"
        "```python\nnot = counted\n```\n\n:::{tab-item} Python\n:sync: python\n:::\n\n"
        "- An item. | no row\n\n| a | b |\n"
    )
    counted = WORDS["count"](page)
    assert counted.words == 2 + 4 + 5 + 4 + 2
    assert counted.mean == (4 + 5 + 2 + 2) / 4


def test_a_long_sentence_is_seen() -> None:
    long = "word " * 31 + "end. "
    counted = WORDS["count"]("Short one. " * 9 + long)
    assert counted.long == 0.1
    assert counted.mean == (9 * 2 + 32) / 10
