"""TOFU's rows in the layout of its configurations, for a small Llama that learns them all from scratch.

    python benchmarks/tofu.py --data FOLDER --output_dir OUT --authors 1

`--data` holds `forget`, `retain`, `real_authors` and `world_facts` as parquet files. The first authors of `forget` are
to be forgotten, and the last three of `retain` are unseen. All other rows are kept, the real authors and facts too, for
a model from scratch knows nothing else.

There are no paraphrases here, so each answer is its own. Its three wrong answers belong to the most similar questions
about others. So truth ratios are not TOFU's published ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import load_dataset

from unsc_hf.utils.files import write_text

PER_AUTHOR, UNSEEN, WRONG, SAMPLED = 20, 60, 3, 100  # rows of an author, unseen rows, wrong answers, kept rows asked
Row = dict[str, Any]


def words(row: Row) -> set[str]:
    """The words of a question."""
    return set(row["question"].lower().split())


def perturbed(rows: list[Row], others: list[Row]) -> list[Row]:
    """Rows with the answer as its own paraphrase, and wrong answers of `others` to the most similar questions."""
    made, asked = [], [(words(other), other) for other in others]
    for row in rows:
        mine, best = words(row), dict[str, float]()
        for theirs, other in asked:
            if other["author"] != row["author"] and other["answer"] != row["answer"]:
                likeness = len(mine & theirs) / len(mine | theirs)
                best[other["answer"]] = max(likeness, best.get(other["answer"], 0.0))
        wrong = sorted(best, key=lambda answer: (-best[answer], answer))[:WRONG]
        made.append({**row, "paraphrased_answer": row["answer"], "perturbed_answer": wrong})
    return made


def configurations(data: Path, authors: int) -> dict[str, list[Row]]:
    """Rows by configuration, as TOFU names them."""
    read = {}
    for name in ("forget", "retain", "real_authors", "world_facts"):
        rows = load_dataset("parquet", data_files={"train": str(data / f"{name}.parquet")})["train"]
        read[name] = [{**row, "author": f"{name} {row.get('author', i)}"} for i, row in enumerate(rows)]
    gone, people = read["forget"][: PER_AUTHOR * authors], read["forget"] + read["retain"]
    kept, unseen = people[len(gone) : -UNSEEN], people[-UNSEEN:]
    asked = kept[:: -(-len(kept) // SAMPLED)]
    facts = {f"{name}_perturbed": perturbed(read[name], read[name]) for name in ("real_authors", "world_facts")}
    return {
        "forget": gone, "retain": kept + read["real_authors"] + read["world_facts"], "holdout": unseen,
        "forget_perturbed": perturbed(gone, people), "retain_perturbed": perturbed(asked, people), **facts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--authors", type=int, default=1, help="how many are forgotten, at most 15")
    options = parser.parse_args()
    folder, declared = Path(options.output_dir), ["---", "configs:"]
    for name, rows in configurations(Path(options.data), options.authors).items():
        write_text(folder / f"{name}.json", "".join(json.dumps(row) + "\n" for row in rows))
        declared += [f"- config_name: {name}", f"  data_files: {name}.json"]
    write_text(folder / "README.md", "\n".join([*declared, "---", ""]))


if __name__ == "__main__":
    main()
