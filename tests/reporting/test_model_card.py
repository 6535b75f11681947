"""Cards parse, carry what a reader needs, and nothing that must stay at home; odd names cannot break them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml
from helpers.results import finished_run
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unsc_hf.reporting.model_card import build_card, escape, public_name, scrubbed_command, write_card


def test_card_parses_and_holds_what_it_must(tmp_path: Path) -> None:
    card = ModelCard.load(write_card(finished_run(), tmp_path))
    assert card.data.base_model == "user/vit"
    assert card.data.license == "mit"
    assert card.data.datasets == ["user/fashion"]
    assert {"unsc", "machine-unlearning"} <= set(card.data.tags)
    metrics = {result.metric_name.split(":")[0]: result.metric_value for result in card.data.eval_results}
    assert metrics == {"AccDut": 0.0, "AccDrt": 0.91}
    assert all(result.dataset_name == "user/fashion" for result in card.data.eval_results)
    for text in (
        "Shirt", "6,000", "suppressed", "0.012", "worst layer, c.d", "reaching its target", "unlearning.png",
        'from_pretrained("user/vit-without-shirt")', "--energy 0.99", "2404.13588", "torch",
    ):  # fmt: skip
        assert text in card.content
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_base_model_is_named_only_by_its_hub_id() -> None:
    """A folder's name would lead readers of the Hub to somebody else's model, or to none."""
    card = build_card(finished_run(base_model="vit-of-mine"))
    assert card.data.base_model is None
    assert getattr(card.data, "base_model_relation", None) is None
    assert card.text.lstrip().startswith("# vit-without-shirt\n\nvit-of-mine after machine unlearning")
    assert build_card(finished_run()).data.base_model_relation == "finetune"


def test_a_card_says_first_what_the_report_says() -> None:
    card = build_card(finished_run(summary=["It is gone.", "At most 1 % of *such* inputs change."])).text
    first = card.split("## ")[0]
    assert "- It is gone.\n- At most 1 % of \\*such\\* inputs change.\n" in first
    assert "](https://pypi.org/project/unsc-hf/)" in first


def test_many_classes_become_a_count_and_a_hash() -> None:
    text = str(build_card(finished_run(forgotten=[f"person {i}" for i in range(40)])))
    assert "40 classes" in text
    assert "person 7" not in text


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30))
@example("{{ 7 * 7 }}")
@example("a|b\n---\n# x")
@example("<script>x</script>")
@example("](javascript:x)")
@example("'\": - é😀")
@example("%}{% for")
def test_no_name_breaks_the_card(name: str) -> None:
    card = ModelCard(str(build_card(finished_run(forgotten=[name], base_model=f"user/{name}", reason=name))))
    assert card.data.model_name == "vit-without-shirt"
    assert yaml.safe_load(card.data.to_yaml())
    assert "<script>" not in card.text
    assert card.text.count("\n## ") == _sections()


@cache
def _sections() -> int:
    return str(build_card(finished_run())).count("\n## ")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["python", "x.py", "--hub_token", "hf_secret", "--a", "1"], "python x.py --hub_token '***' --a 1"),
        (["x.py", "--hub-token", "hf_secret", "--Token=x"], "x.py --hub-token '***' '--Token=***'"),
        (["x.py", "--hub_token=hf_secret"], "x.py '--hub_token=***'"),
        (
            ["x.py", "--dataset_name", "/home/me/data/cats", "--model=../up/model"],
            "x.py --dataset_name cats --model=model",
        ),
        (["x.py", "--model_name_or_path", "user/model"], "x.py --model_name_or_path user/model"),
    ],
)
def test_commands_lose_secrets_and_folders(arguments: list[str], shown: str) -> None:
    assert scrubbed_command(arguments) == shown


def test_public_names_keep_hub_ids_and_drop_folders(tmp_path: Path) -> None:
    assert public_name("user/model") == "user/model"
    assert public_name(str(tmp_path / "gone" / "model")) == "model"  # also when the folder is no longer there
    assert public_name("~/models/vit") == "vit"
    assert public_name("") == ""


def test_escaped_text_is_inert() -> None:
    assert escape("a|b *c* <i>") == r"a\|b \*c\* &lt;i&gt;"
