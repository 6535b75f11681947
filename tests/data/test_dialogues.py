"""Questions, prompts and messages as token ids: the same as open-unlearning's, one beginning, and nothing cut."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers.language import questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unsc_hf import UNSCError
from unsc_hf.data.dialogues import (
    IGNORED,
    DialogueTransform,
    PromptFormat,
    chunk_texts,
    prepare_dialogues,
    to_dialogues,
)
from unsc_hf.data.sources import config_names, load_config

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "evaluation" / "language" / "golden.json").read_text(encoding="utf-8")
)
FORMATS = {
    "llama3": PromptFormat(None, "You are a helpful assistant.", {"date_string": "10 Apr 2025"}),
    "plain": PromptFormat("Question: {prompt}\\nAnswer: "),
    "space": PromptFormat("Question: {prompt}\\nAnswer:"),
}


def like_llama(tokenizer: Any) -> Any:
    """Llama-3's special tokens, its chat template, and a beginning that the tokenizer adds by itself."""
    begin, *roles, end = GOLDEN["special"]
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end, "additional_special_tokens": roles})
    token = (begin, tokenizer.convert_tokens_to_ids(begin))
    template = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[token]
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )
    tokenizer.chat_template = GOLDEN["chat_template"]
    tokenizer.model_max_length = 512
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = Tokenizer(models.BPE(GOLDEN["vocab"], [tuple(pair.split(" ")) for pair in GOLDEN["merges"]]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return like_llama(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>"))


def encoded(tokenizer: Any, prompt_format: PromptFormat, row: dict[str, str]) -> dict[str, list[int]]:
    start, ids = DialogueTransform(tokenizer).encode(prompt_format.row(row["question"], row["answer"]))
    return {"input_ids": ids, "labels": [IGNORED] * len(start) + ids[len(start) :]}


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_masks_are_open_unlearnings(name: str, tokenizer: Any) -> None:
    assert [encoded(tokenizer, FORMATS[name], row) for row in GOLDEN["rows"]] == GOLDEN["tokens"][name]


@pytest.mark.parametrize("name", FORMATS)
def test_forty_rows_are_open_unlearnings(name: str, golden_tofu: Path) -> None:
    tokenizer = like_llama(AutoTokenizer.from_pretrained(golden_tofu / "models" / "partial"))
    digests = []
    for row in load_config(str(golden_tofu / "data"), "forget10", "forget_config"):
        made = encoded(tokenizer, FORMATS[name], row)
        pair = [made["input_ids"], made["labels"]]
        digests.append(hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:16])
    assert digests == GOLDEN["digests"][name]


def test_the_three_formats_are_one(tokenizer: Any) -> None:
    """Question and answer, prompt and completion as messages, and messages give the same tokens, with one beginning."""
    row = GOLDEN["rows"][0]
    made = FORMATS["llama3"].row(row["question"], row["answer"])
    options = {"chat_template_kwargs": made["chat_template_kwargs"]}
    messages = {"messages": made["prompt"] + made["completion"], **options}
    encode = DialogueTransform(tokenizer).encode
    start, ids = encode(messages)
    assert (start, ids) == encode(made)
    assert ids.count(tokenizer.bos_token_id) == 1
    labelled = prepare_dialogues(Dataset.from_list([messages]), tokenizer, completion_only=True)[0]["labels"]
    text = tokenizer.decode([token for token in labelled if token != IGNORED])
    assert text == row["answer"] + tokenizer.eos_token
    plain = {"prompt": f"{tokenizer.bos_token}Hello", "completion": " you"}
    assert encode(plain)[1].count(tokenizer.bos_token_id) == 1
    start, ids = encode({"text": "Hello"})
    assert start == [tokenizer.bos_token_id]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_templates() -> None:
    assert PromptFormat("Q: {question}\\nA:").row("Who?", "I.") == {"prompt": "Q: Who?\nA:", "completion": " I."}
    assert PromptFormat("[INST] {prompt} [/INST]{completion}").row("Who {x}?", "I.") == {
        "prompt": "[INST] Who {x}? [/INST]", "completion": "I.",
    }  # fmt: skip
    with pytest.raises(UNSCError, match=r"^prompt_template: 'Answer:' has no \{prompt\}"):
        PromptFormat("Answer:")
    with pytest.raises(UNSCError, match="goes on after .completion.; let it end there"):
        PromptFormat("{prompt}{completion}</s>")
    with pytest.raises(UNSCError, match="^dataset_name: a row has no question or no answer"):
        PromptFormat().row("Who?", "")


def test_a_chat_template_is_used_where_there_is_one(tokenizer: Any) -> None:
    assert PromptFormat.of(None, tokenizer).template is None
    assert PromptFormat.of(None, None) == PromptFormat()
    assert PromptFormat.of("{prompt}", tokenizer).template == "{prompt}"
    made = PromptFormat.of(None, tokenizer, "You are a helpful assistant.", '{"date_string": "10 Apr 2025"}')
    assert made == FORMATS["llama3"]
    with pytest.raises(UNSCError, match="^chat_template_kwargs: got 'date'; write a JSON object"):
        PromptFormat.of(None, tokenizer, None, "date")
    with pytest.raises(UNSCError, match="^system_prompt: got 'Hi', but no chat template is used"):
        PromptFormat.of("{prompt}", tokenizer, system_prompt="Hi")


def test_messages_need_a_chat_template(tokenizer: Any) -> None:
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(UNSCError, match="^processing_class: the rows hold messages, .* no chat template"):
            prepare_dialogues(rows, tokenizer, completion_only=True)
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(UNSCError, match="^chat_template_kwargs: .* writes a prompt otherwise"):
            prepare_dialogues(rows, tokenizer, completion_only=True)[0]
    finally:
        tokenizer.chat_template = template


def test_long_texts_are_cut_into_chunks_or_refused(tokenizer: Any) -> None:
    text = "".join(f"Person {i} lives in town {i * 7}. " for i in range(60))
    rows = Dataset.from_dict({"text": [text, "short"]})
    with pytest.raises(UNSCError, match=r"^dataset_name: a row has \d+ tokens .* \(chunk_size 512 or less\)"):
        prepare_dialogues(rows, tokenizer, completion_only=True)[0]
    chunks = chunk_texts(rows, tokenizer, 100)
    assert "".join(chunks["text"]) == text + "short"
    assert max(len(row["input_ids"]) for row in prepare_dialogues(chunks, tokenizer, True)) <= 105
    assert chunk_texts(rows, tokenizer, None) is rows
    for size in (0, 513):
        with pytest.raises(UNSCError, match=f"^chunk_size: got {size}; choose a whole number from 1 to 512"):
            chunk_texts(rows, tokenizer, size)


# ---- data sets as they are published ---------------------------------------------------------------------------------
def test_configurations(tmp_path: Path) -> None:
    """Declared in README.md, or a folder each; an unknown one lists those that exist."""
    declared, folders = tmp_path / "declared", tmp_path / "folders"
    lines = []
    for name, rows in (("forget10", questions(2)), ("retain90", questions(3, start=10))):
        (folders / name).mkdir(parents=True)
        rows.to_parquet(folders / name / "train.parquet")
        declared.mkdir(exist_ok=True)
        rows.to_json(declared / f"{name}.json")
        lines.append(f"- config_name: {name}\n  data_files: {name}.json")
    (declared / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    for folder in (declared, folders):
        assert config_names(str(folder)) == ["forget10", "retain90"]
        loaded = load_config(str(folder), "retain90", "retain_config", cache_dir=str(tmp_path / "cache"))
        assert loaded["question"][:] == questions(3, start=10)["question"][:]
        with pytest.raises(
            UNSCError, match="^forget_config: no configuration 'forget99' .* choose from forget10, retain90"
        ):
            load_config(str(folder), "forget99", "forget_config")
        with pytest.raises(UNSCError, match="^forget_split: no split 'test' in 'forget10'; splits found: train"):
            load_config(str(folder), "forget10", "forget_config", "test", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UNSCError, match="^dataset_name: cannot load"):
        config_names("nobody/nothing-of-this-name")


def test_the_answer_may_be_in_another_column() -> None:
    verbatim = to_dialogues(Dataset.from_dict({"prompt": ["Once upon"], "gt": ["a time."]}))
    assert verbatim[0] == {"prompt": "Once upon", "completion": " a time."}
    rows = questions(2).rename_column("answer", "paraphrased_answer")
    assert to_dialogues(rows, answer="paraphrased_answer")["completion"][0] == " P0 lives in Oslo."
    with pytest.raises(UNSCError, match="expected question and answer, prompt and completion, messages, or text"):
        to_dialogues(rows)
