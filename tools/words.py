"""Words and lengths of sentences of README and of every guide, and a failure beyond the limits.

    python tools/words.py

Code and outputs are not counted; tables and headings count as words, not as sentences.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SHELVES = ("get_started", "how_to", "concepts")
README_WORDS, GUIDE_WORDS, ALL_GUIDES_WORDS = 900, 600, 6000
MEAN, LONG, LONG_SHARE = 17.0, 30, 0.05

_FENCED = re.compile(r"^( *)```\w*\n.*?^\1```$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^ *(:::.*|```.*|:[\w-]+:.*|<!--.*-->)$", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_APART = re.compile(r"^(#+ .*|\|.*)$", re.MULTILINE)  # headings and rows of tables
_ITEM = re.compile(r"^ *(?:- |\d+\. |> |: )", re.MULTILINE)
_END = re.compile(r"(?<=[.!?])[*_\"')]*\s+|\n\s*\n")


class Counted(NamedTuple):
    """What was counted on a page."""

    words: int
    mean: float  # words of a sentence
    long: float  # share of sentences of more than `LONG` words


def words_in(text: str) -> int:
    return len(re.findall(r"\w\S*", text))


def count(page: str) -> Counted:
    """Words of a page in Markdown, and the lengths of its sentences."""
    text = _LINK.sub(r"\1", _DIRECTIVE.sub("", _FENCED.sub("\n", page)))
    sentences = [words_in(part) for part in _END.split(_ITEM.sub("\n\n", _APART.sub("\n", text)))]
    lengths = [length for length in sentences if length]
    long = sum(length > LONG for length in lengths)
    return Counted(words_in(text), sum(lengths) / max(len(lengths), 1), long / max(len(lengths), 1))


def main() -> int:
    """The number of limits that are broken."""
    guides = [path for shelf in SHELVES for path in sorted((ROOT / "docs" / shelf).glob("*.md"))]
    broken, total = 0, 0
    for path in [ROOT / "README.md", *guides]:
        found = count(path.read_text(encoding="utf-8"))
        most = README_WORDS if path.name == "README.md" else GUIDE_WORDS
        wrong = found.words > most or found.mean > MEAN or found.long > LONG_SHARE
        broken += wrong
        total += 0 if path.name == "README.md" else found.words
        name = str(path.relative_to(ROOT))
        print(f"{name:38} {found.words:5} words {found.mean:5.1f} a sentence {found.long:4.0%} over {LONG}", end="")
        print("   too many or too long" if wrong else "")
    print(f"{'guides together':38} {total:5} words")
    return broken + (total > ALL_GUIDES_WORDS)


if __name__ == "__main__":
    sys.exit(main())
