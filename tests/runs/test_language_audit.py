"""`unsc audit lm`: what each audit reads, its files, the verdict, going on where it stopped, and bad input."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.language import questions
from helpers.tofu import CONFIGS, perturbed, write_model, write_tofu
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from unsc_hf import audit_language_model
from unsc_hf.cli.main import main
from unsc_hf.comparison.references.texts import LanguagePlan
from unsc_hf.comparison.references.training import train_model
from unsc_hf.data.dialogues import PromptFormat, to_dialogues
from unsc_hf.evaluation.language import audits
from unsc_hf.evaluation.language.audits import ANSWER_AUDITS, AnswerExamination, choose_rate, examine
from unsc_hf.evaluation.language.flips import token_flips
from unsc_hf.evaluation.language.tofu import TofuEvaluation
from unsc_hf.runs import language_audit
from unsc_hf.runs.language_audit import AUDIT, verdict_on

QUIET = ["--use_cpu", "--disable_tqdm", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that knows the answers about eight people, of whom three are to be forgotten."""
    rows, plan = to_dialogues(questions(8)), LanguagePlan(size="nano", vocabulary_size=300, max_length=128)
    plan = LanguagePlan(size="nano", vocabulary_size=300, max_length=128, epochs=60.0, batch_size=8, learning_rate=3e-3)
    return train_model(rows, plan, tmp_path_factory.mktemp("models"), "knowing")


def examination(model: Any, tokenizer: Any, original: Any = None, **options: Any) -> AnswerExamination:
    """Three people to forget, five to keep and three unseen."""
    sets = {"forget": perturbed(questions(3)), "retain": questions(5, start=3), "holdout": questions(3, start=60)}
    evaluation = TofuEvaluation(model, tokenizer, sets, PromptFormat(), batch_size=4, max_new_tokens=12)
    return AnswerExamination(evaluation, original or model, options.pop("shots", 2), **options)


@pytest.fixture
def known(knowing: Path) -> AnswerExamination:
    return examination(AutoModelForCausalLM.from_pretrained(knowing), AutoTokenizer.from_pretrained(knowing))


@pytest.fixture
def unknown(knowing: Path) -> AnswerExamination:
    """The same architecture without training."""
    config = AutoModelForCausalLM.from_pretrained(knowing).config
    return examination(AutoModelForCausalLM.from_config(config), AutoTokenizer.from_pretrained(knowing))


# ---- what each audit reads -------------------------------------------------------------------------------------------
def test_a_model_that_knows_is_told_from_one_that_does_not(
    known: AnswerExamination, unknown: AnswerExamination
) -> None:
    names = ["answers", "prefix", "membership", "quantisation", "kept"]
    knows, guesses = examine(known, names), examine(unknown, names)
    assert knows["answers"]["exact_memorization"] > 0.9 > 0.3 > guesses["answers"]["exact_memorization"]
    for share in ("rouge_l_0", "rouge_l_25", "rouge_l_50"):
        assert knows["prefix"][share] > 0.8 > 0.5 > guesses["prefix"][share]
    assert knows["membership"]["loss"] > 0.9
    assert knows["quantisation"]["int8"] > 0.9
    assert knows["quantisation"]["int4"] > 0.5
    assert knows["kept"] == {"flips": 0.0}


def test_rounding_leaves_sixteen_values_in_a_block_and_the_head_alone(
    known: AnswerExamination, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(AnswerExamination, "known", lambda exam, model, rows: seen.append(model) or 0.5)
    before = deepcopy(known.evaluation.model.state_dict())
    assert examine(known, ["quantisation"])["quantisation"] == {"int8": 0.5, "int4": 0.5}
    int8, int4 = (model.model.layers[0].mlp.down_proj.weight.detach() for model in seen)
    assert max(len(block.unique()) for block in int4.reshape(-1, 64)) <= 15
    assert 15 < max(len(row.unique()) for row in int8) <= 255
    weight = before["model.layers.0.mlp.down_proj.weight"]
    for rounded, bits, part in ((int8, 8, int8.shape[1]), (int4, 4, 64)):
        step = weight.reshape(-1, part).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((rounded - weight).reshape(-1, part).abs() <= step / 2 + 1e-7).all()
    assert torch.equal(seen[1].get_output_embeddings().weight, before["lm_head.weight"])
    after = known.evaluation.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "audits work on copies"


def test_paraphrased_questions_come_before_paraphrased_answers(known: AnswerExamination) -> None:
    otherwise = examine(known, ["paraphrase"])["paraphrase"]["exact_memorization"]
    plain = examine(known, ["answers"])["answers"]["exact_memorization"]
    forget = known.evaluation.sets["forget"]
    known.evaluation.sets = {"forget": forget.add_column("paraphrased_question", forget["question"][:])}
    assert examine(known, ["paraphrase"])["paraphrase"]["exact_memorization"] == plain != otherwise
    known.evaluation.sets = {"forget": forget.remove_columns("paraphrased_answer")}
    known.evaluation._readings.clear()
    known.evaluation._tokens.clear()
    assert examine(known, ["paraphrase"]) == {"paraphrase": {}}


def test_what_the_models_are_asked(known: AnswerExamination, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, forget = known.evaluation.tokenizer.decode, known.evaluation.sets["forget"]
    asked = [f"Tell me: {question}" for question in forget["question"]]
    known.evaluation.sets = {"forget": forget.add_column("paraphrased_question", asked)}
    read: list[str] = []
    monkeypatch.setattr(
        AnswerExamination,
        "known",
        lambda exam, model, rows: read.extend(decode(row["input_ids"]) for row in rows) or 0.5,
    )
    assert examine(known, ["paraphrase"]) == {"paraphrase": {"exact_memorization": 0.5}}
    assert all(f"Tell me: {question}" in text for question, text in zip(forget["question"], read, strict=True))

    prompts: list[list[str]] = []

    def answer(model: object, tokens: list[list[int]], *_: object) -> list[list[int]]:
        prompts.append([decode(ids) for ids in tokens])
        return [[] for _ in tokens]

    monkeypatch.setattr(audits, "generate", answer)
    examine(known, ["prefix"])
    for none, quarter, half, truth in zip(*prompts, forget["answer"], strict=True):
        assert none < quarter < half
        given = [len(text) - len(none) for text in (quarter, half)]
        assert given[0] / len(truth) < 0.45 < given[1] / len(truth) < 0.85


def test_relearning_teaches_some_and_asks_for_others(known: AnswerExamination, unknown: AnswerExamination) -> None:
    given, others = unknown.given()
    assert (len(given), len(others)) == (2, 4)
    assert not [row for row in given if row in others]
    rate = choose_rate(unknown)
    assert rate is not None
    reading = examine(examination(unknown.evaluation.model, unknown.evaluation.tokenizer, rate=rate), ["relearning"])
    assert reading["relearning"]["learned"] >= 0.9
    curve = reading["relearning"]["curve"]
    assert len(curve) == 9
    assert curve[0] == unknown.known(unknown.evaluation.model, others)
    assert reading["relearning"]["area"] == pytest.approx(np.mean(curve))
    knows = examine(examination(known.evaluation.model, known.evaluation.tokenizer, rate=rate), ["relearning"])
    assert knows["relearning"]["curve"][0] > 0.9
    assert np.isnan(examine(unknown, ["relearning"])["relearning"]["area"]), "no rate was strong enough"


def test_merging_an_adapter_is_examined(known: AnswerExamination, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[list[bool]] = []

    def count(before: nn.Module, after: nn.Module, *rest: Any) -> Any:
        layers = [module for model in (before, after) for module in model.modules()]
        compared.append([module.merged for module in layers if isinstance(module, BaseTunerLayer)])
        return token_flips(before, after, *rest)

    monkeypatch.setattr(audits, "token_flips", count)
    assert examine(known, ["merge"]) == {"merge": {}}, "not an adapter"
    adapted = get_peft_model(deepcopy(known.evaluation.model), LoraConfig(r=2, target_modules=["down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=8.0)
    exam = examination(adapted, known.evaluation.tokenizer)
    changed = exam.known(adapted, exam.forgotten)
    assert changed < known.known(known.evaluation.model, known.forgotten)
    assert examine(exam, ["merge"])["merge"] == {"flips": 0.0, "exact_memorization": pytest.approx(changed)}
    half = len(compared[0]) // 2
    assert half > 0
    assert compared == [[False] * half + [True] * half]


# ---- the verdict -----------------------------------------------------------------------------------------------------
def readings(value: float) -> dict[str, Any]:
    return {name: {one.headline: value} for name, one in ANSWER_AUDITS.items() if one.headline}


def test_the_verdict_compares_every_headline_with_three_retrained_models() -> None:
    retrained = {f"retrained {i}": readings(0.30 + 0.01 * i) for i in range(3)}
    assert verdict_on({"audited": readings(0.31), **retrained}).word == "suppressed"
    known = verdict_on({"audited": {**readings(0.31), "prefix": {"rouge_l_50": 0.6}}, **retrained})
    assert (known.word, known.outside) == ("not forgotten", ["ROUGE-L after half the answer"])
    two = {title: retrained[title] for title in ("retrained 0", "retrained 1")}
    assert verdict_on({"audited": readings(0.31), **two}).word == "not judged"


# ---- files and going on ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("tofu") / "data")


def words(knowing: Path, data: Path, out: Path, *more: Any) -> list[str]:
    given = ["--audited", knowing, "--model_name_or_path", knowing, "--dataset_name", data, *CONFIGS, *QUIET]
    return ["audit", "lm", *map(str, [*given, "--output_dir", out, *more])]


def test_files_and_going_on(
    knowing: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "other")
    tokens = AutoTokenizer.from_pretrained(knowing)
    model = AutoModelForCausalLM.from_pretrained(knowing)
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path / "retrained")
    tokens.save_pretrained(tmp_path / "retrained")
    command = words(
        knowing, data, tmp_path / "out", "--audits", "answers", "kept", "relearning", "--shots", "2",
        "--retrained_model_name_or_path", tmp_path / "retrained",
    )  # fmt: skip
    assert main(command) == 0
    content = json.loads((tmp_path / "out" / AUDIT).read_text())
    assert content["verdict"]["word"] == "not judged"
    assert set(content["models"]) == {"original", "audited", "retrained 1"}
    assert content["models"]["original"] == content["models"]["audited"]
    assert content["models"]["retrained 1"]["kept"]["flips"] > 0.5
    assert content["relearning_rate"] > 0
    header, *rows = content["table"]
    assert header == ["model", "tokens recited", "other answers after relearning", "tokens changed in kept answers"]
    assert [row[0] for row in rows] == ["original", "audited", "retrained 1"]
    assert rows[0][1] == f"{100 * content['models']['original']['answers']['exact_memorization']:.1f}"
    assert "Verdict: not judged." in capsys.readouterr().out
    assert "tokens recited" in (tmp_path / "out" / "report.html").read_text()
    assert "tokens recited" in (tmp_path / "out" / "table.md").read_text()
    monkeypatch.setattr(language_audit, "examine", lambda *_: pytest.fail("this was examined already"))
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / AUDIT).read_text())["models"] == content["models"]


def test_from_python(knowing: Path, data: Path, tmp_path: Path) -> None:
    found = audit_language_model(
        str(knowing), str(knowing), str(data), forget_config="forget10", retain_config="retain90", use_cpu=True,
        disable_tqdm=True, audits=["answers"], output_dir=str(tmp_path / "out"), max_rows=4,
    )  # fmt: skip
    assert set(found["models"]) == {"original", "audited"}
    assert found["verdict"]["word"] == "not judged"


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--audited", "nowhere"], "audited: cannot load 'nowhere'"),
        (["--retrained_model_name_or_path", "nowhere"], "retrained_model_name_or_path: cannot load 'nowhere'"),
        (["--audits", "prefixes"], "audits: 'prefixes' does not exist; closest: 'prefix'"),
        (["--shots", "0"], "shots: got 0; choose a whole number of 1 or more."),
        (["--forget_config", "forget99"], "forget_config: no configuration 'forget99'"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, knowing: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(knowing, data, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_must_be_given_and_read_the_same_tokens(
    knowing: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "lm", "--model_name_or_path", str(knowing), "--dataset_name", str(data), *CONFIGS]) == 2
    assert "audited: not given; name the audited model" in capsys.readouterr().err
    original = SimpleNamespace(config=SimpleNamespace(vocab_size=300))
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=301))
    with pytest.raises(Exception, match="^audited: knows 301 tokens, the original 300"):
        language_audit._check_vocabulary("audited", model, original)
