"""Language models: what is labelled and measured, the promise under every objective, and the recipe from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.language import VOCABULARY, Data, answer_logits, make_lm, questions
from helpers.models import fit, relative
from helpers.tofu import write_tofu
from helpers.training import make_trainer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from unsc_hf import UNSCConfig, UNSCError
from unsc_hf.comparison.arguments import LanguageArguments
from unsc_hf.comparison.references.texts import LanguagePlan
from unsc_hf.comparison.references.training import train_model
from unsc_hf.data.dialogues import IGNORED, AnswerCollator, DialogueTransform, prepare_dialogues, to_dialogues
from unsc_hf.evaluation.answers import evaluate_answers
from unsc_hf.evaluation.language.answering import generate
from unsc_hf.models.outputs import Outputs, read_answers
from unsc_hf.nullspace.projection import NullSpaceProjection
from unsc_hf.objectives import OBJECTIVES, Terms
from unsc_hf.runs.language import load_rows, run
from unsc_hf.tasks.causal_lm import REFUSALS, SOFT_TOKENS, CausalLMTask

PLAN = LanguagePlan(size="nano", vocabulary_size=300, max_length=64)


# ---- rows -----------------------------------------------------------------------------------------------------------
def test_only_the_completion_is_labelled_and_nothing_is_lost() -> None:
    rows = to_dialogues(questions(6))
    _, tokenizer = PLAN.start(rows)
    prepared = prepare_dialogues(rows, tokenizer, completion_only=True)
    for row, raw in zip(prepared, rows, strict=True):
        labelled = [t for t in row["labels"] if t != IGNORED]
        assert tokenizer.decode(labelled, skip_special_tokens=True) == raw["completion"]
        assert labelled[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == raw["prompt"] + raw["completion"]
    everything = prepare_dialogues(rows, tokenizer, completion_only=False)[0]
    assert everything["labels"][1:] == everything["input_ids"][1:]
    batch = AnswerCollator.of(tokenizer)([prepared[i] for i in range(4)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert bool(((batch["labels"] == IGNORED) | (batch["attention_mask"] == 1)).all())


def test_bad_rows(token_data: Data, tmp_path: Path) -> None:
    model = make_lm()
    with pytest.raises(UNSCError, match="needs prompt and completion, messages, or text"):
        prepare_dialogues(Dataset.from_dict({"a": ["x"]}), None, True)
    with pytest.raises(UNSCError, match="a tokenizer is needed"):
        prepare_dialogues(Dataset.from_dict({"text": ["x"]}), None, True)
    with pytest.raises(UNSCError, match="no labels"):
        prepare_dialogues(Dataset.from_dict({"input_ids": [[1, 2]]}), None, True)
    with pytest.raises(UNSCError, match="no labelled token"):
        AnswerCollator(1)([{"input_ids": [3, 4], "labels": [IGNORED, IGNORED]}])
    _, tokenizer = PLAN.start(to_dialogues(questions(2)))
    tokenizer.pad_token = None
    with pytest.raises(UNSCError, match="no padding token"):
        prepare_dialogues(Dataset.from_dict({"text": ["x"]}), tokenizer, True)
    with pytest.raises(UNSCError, match="unseen_dataset: not given"):
        make_trainer(model, token_data, tmp_path, target_forget_accuracy=None)
    with pytest.raises(UNSCError, match="nearest_mean"):
        make_trainer(model, token_data, tmp_path, pseudo_labels="nearest_mean")
    with pytest.raises(UNSCError, match="choose from .*unsc, "):
        UNSCConfig(output_dir=str(tmp_path), objective="oblivion")


# ---- answers --------------------------------------------------------------------------------------------------------
def test_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    rows = to_dialogues(questions(5))
    model, tokenizer = PLAN.start(rows)
    prompts = [DialogueTransform(tokenizer).encode(row)[0] for row in rows]
    together, alone = (
        generate(model, prompts, tokenizer.pad_token_id, tokenizer.eos_token_id, 8, batch_size=n) for n in (10, 1)
    )
    assert together == alone


# ---- objectives -----------------------------------------------------------------------------------------------------
def _terms(**options: Any) -> Terms:
    logits = torch.randn(9, 7, dtype=torch.float32, requires_grad=True)
    labels, samples = torch.randint(7, (9,)), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    bare = Terms(logits, labels, (labels + 1) % 7, samples, torch.zeros(3))
    return Terms(logits, labels, (labels + 1) % 7, samples, bare.log_likelihood().detach(), **options)


def _gradient(loss: torch.Tensor, terms: Terms) -> torch.Tensor:
    return torch.autograd.grad(loss, terms.logits)[0]


def test_npo_starts_as_ascent_on_each_samples_likelihood() -> None:
    terms = _terms()
    loss = OBJECTIVES["npo_forget"].loss(terms, {"beta": 0.3})
    assert float(loss) == pytest.approx(2 / 0.3 * math.log(2), rel=1e-5)
    torch.testing.assert_close(_gradient(loss, terms), _gradient(terms.log_likelihood().mean(), terms))


def test_simnpo_is_bounded_below_and_uses_the_mean_token() -> None:
    terms, options = _terms(), {"beta": 2.0, "gamma": 0.5}
    mean = terms.log_likelihood() / terms.lengths()
    expected = -(2 / 2.0) * torch.nn.functional.logsigmoid(-2.0 * mean - 0.5).mean()
    assert float(OBJECTIVES["simnpo_forget"].loss(terms, options)) == pytest.approx(float(expected), rel=1e-5)
    assert float(OBJECTIVES["simnpo_forget"].loss(terms, options)) > 0


def test_ascent_and_difference() -> None:
    terms, triple = _terms(retain_loss=torch.tensor(2.5)), {"retain_weight": 3.0}
    assert float(OBJECTIVES["gradient_ascent"].loss(terms)) == pytest.approx(-float(terms.loss()))
    assert float(OBJECTIVES["gradient_difference"].loss(terms, triple)) == pytest.approx(7.5 - float(terms.loss()))
    forgetting = float(OBJECTIVES["unsc"].loss(terms))
    assert float(OBJECTIVES["unsc_retain"].loss(terms, triple)) == pytest.approx(7.5 + forgetting)


def test_targets_leave_the_true_token_out(token_data: Data, tmp_path: Path) -> None:
    for strategy in ("top1", "soft", "second", "random"):
        trainer = make_trainer(make_lm(), token_data, tmp_path / strategy, pseudo_labels=strategy)
        trainer.prepare_unlearning()
        rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        batch = trainer.data_collator(rows)
        task = trainer.task
        assert isinstance(task, CausalLMTask)
        logits = torch.zeros(*batch["labels"].shape, VOCABULARY)
        _, true, targets, samples = task.positions(logits, batch["labels"], batch["pseudo_labels"])
        assert len(true) == int((batch["labels"][:, 1:] != IGNORED).sum())
        if strategy == "soft":
            torch.testing.assert_close(targets.sum(1), torch.ones(len(true)))
            assert float(targets.gather(1, true[:, None]).abs().max()) == 0.0
            assert VOCABULARY < SOFT_TOKENS  # nothing was cut off here
        else:
            assert not bool((targets == true).any())
        assert samples.max() == len(rows) - 1


def test_random_labels_do_not_depend_on_how_batches_are_cut(token_data: Data, tmp_path: Path) -> None:
    labels = []
    for size in (3, 256):
        trainer = make_trainer(
            make_lm(), token_data, tmp_path / str(size), pseudo_labels="random", per_device_eval_batch_size=size
        )
        trainer.prepare_unlearning()
        rows = trainer.train_dataset
        labels.append(torch.cat([rows[i]["pseudo_labels"] for i in range(len(rows))]))
    assert torch.equal(*labels)


# ---- the promise ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", [name for name, each in OBJECTIVES.items() if "refusal" not in each.needs])
def test_retained_answers_do_not_move_under_any_objective(objective: str, token_data: Data, tmp_path: Path) -> None:
    model = make_lm()
    forget, retain = token_data
    before, before_forget = answer_logits(model, retain), answer_logits(model, forget)
    # SimNPO's own margin is so wide that answers of an untrained model count as forgotten.
    more = {"objective_args": {"beta": 0.1}} if objective == "simnpo" else {}
    trainer = make_trainer(
        model, token_data, tmp_path, check_steps=100, objective=objective, learning_rate=2e-4, weight_decay=0.1, **more
    )
    trainer.train()
    assert relative(answer_logits(trainer.model, retain), before) <= 1e-6
    if objective != "fine_tune":  # its gradient comes from retained rows alone: nothing of it lies in the null space
        assert relative(answer_logits(trainer.model, forget), before_forget) > 3e-4
    assert trainer.certify().leak < 1e-5


def test_refusals_take_the_place_of_answers(token_data: Data, tmp_path: Path) -> None:
    """IdkDPO makes them likelier than the answers were, and needs a tokenizer to write them."""
    rows, kept = to_dialogues(questions(2)), to_dialogues(questions(6, start=20))
    model, tokenizer = PLAN.start(to_dialogues(questions(26)))
    trainer = make_trainer(
        model, (rows, kept), tmp_path, objective="idk_dpo", check_steps=100, max_steps=30, learning_rate=3e-3,
        energy=0.9, trainer_kwargs={"processing_class": tokenizer},
    )  # fmt: skip
    batch = AnswerCollator.of(tokenizer)(list(prepare_dialogues(rows, tokenizer, True)))
    labels = batch.pop("labels")
    inputs, refused = trainer.task.refusals(batch, labels)
    for before, after, true in zip(batch["input_ids"], inputs["input_ids"], refused, strict=True):
        answer = tokenizer.decode([token for token in true.tolist() if token != IGNORED], skip_special_tokens=True)
        assert answer.removeprefix(" ") in REFUSALS
        start = int((true != IGNORED).nonzero()[0])
        assert torch.equal(before[:start], after[:start])
    likelihood = [float(model(**inputs, labels=refused).loss)]
    trainer.train()
    likelihood.append(float(trainer.model(**inputs, labels=refused).loss))
    assert likelihood[1] < likelihood[0]
    with pytest.raises(UNSCError, match="^processing_class: not given; objective 'idk_dpo' writes refusals"):
        make_trainer(make_lm(), token_data, tmp_path, objective="idk_dpo").train()


def test_without_displacement_projection_the_promise_breaks(
    token_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NullSpaceProjection, "project_displacements", lambda *args, **kwargs: None)
    model = make_lm()
    before = answer_logits(model, token_data[1])
    make_trainer(model, token_data, tmp_path, check_steps=100, learning_rate=2e-4, weight_decay=0.1).train()
    assert relative(answer_logits(model, token_data[1]), before) > 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters(kind: str, token_data: Data, tmp_path: Path) -> None:
    model = make_lm(kind)
    before = answer_logits(model, token_data[1])
    trainer = make_trainer(
        model,
        token_data,
        tmp_path,
        check_steps=100,
        learning_rate=2e-4,
        weight_decay=0.1,
        trainer_kwargs={"peft_config": LoraConfig(r=4)},
    )
    trainer.train()
    network = trainer.accelerator.unwrap_model(trainer.model)
    assert relative(answer_logits(network, token_data[1]), before) <= 1e-6
    certificate = trainer.certify()
    assert certificate.merged is not None
    assert certificate.merged["float32"].relative <= 1e-5


def test_target_is_what_unseen_rows_score(tmp_path: Path) -> None:
    """Unlearning stops where forgotten answers are known as well as unseen ones, not past it."""
    rows = to_dialogues(questions(12))
    forget, retain, unseen = rows.select(range(8)), rows.select(range(8, 24)), to_dialogues(questions(6, start=40))
    model, tokenizer = PLAN.start(rows)
    fit(model, AnswerCollator.of(tokenizer)(list(prepare_dialogues(rows, tokenizer, True))), steps=120)
    trainer = make_trainer(
        model,
        (forget, retain),
        tmp_path,
        target_forget_accuracy=None,
        check_steps=2,
        max_steps=300,
        learning_rate=3e-3,
        energy=0.95,
        trainer_kwargs={"processing_class": tokenizer, "unseen_dataset": unseen},
    )
    trainer.train()
    assert trainer.plan is not None
    last = [entry for entry in trainer.state.log_history if "leak" in entry]
    assert last[0]["forget_accuracy"] > 0.95
    assert trainer.stop_reason == "target"
    assert last[-1]["forget_accuracy"] <= trainer.goal.target < 0.9
    assert last[-1]["forget_accuracy"] > trainer.goal.target - 0.15
    metrics = trainer.evaluate(trainer.reader.prepare(unseen))
    assert 0 <= metrics["eval_accuracy"] <= 1


# ---- the recipe -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_everything_is_written_and_loads(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    questions(6).to_parquet(folder / "forget.parquet")
    questions(10, start=20).to_parquet(folder / "retain.parquet")
    questions(3, start=90).to_parquet(folder / "world.parquet")
    arguments = LanguageArguments(
        dataset_name=str(folder),
        forget_column="person",
        forget_values=["0", "1"],
        unseen_column="person",
        unseen_values=["28", "29"],
        objectives=["npo", "unsc"],
        train_original=True,
        train_retrained=True,
        model_size="nano",
        train_epochs=30,
        train_batch_size=8,
        train_learning_rate=3e-3,
        max_new_tokens=16,
        references_dir=str(tmp_path / "references"),
    )
    config = UNSCConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, max_steps=20, rows_per_direction=None
    )
    run(arguments, config)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["methods"]) == {
        "original", "unsc", "unsc unprojected", "npo", "npo unprojected", "retrained",
    }  # fmt: skip
    assert set(results["methods"]["unsc"]["sets"]) == {"forget", "retain", "unseen", "world"}
    assert results["request"]["rows"] == 4
    assert results["methods"]["original"]["flips"] == results["methods"]["original"]["drift"] == 0.0
    flips = results["methods"]["npo unprojected"]
    assert 0 < flips["flips"] < flips["flips_upper_95"] < 1
    assert flips["drift"] > results["methods"]["npo"]["drift"] > 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert "AutoTokenizer" in card.text
    assert "ROUGE-L" in card.text
    assert "| **npo** |" in card.text, "the row of the model that was written"
    assert "**UNSC" not in card.text.split("## Compared")[1].split("ROUGE-L: ")[0]
    assert not any(f"P{i} " in card.text for i in range(2))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size > 0
    for picture in ("answers.png", "unlearning.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 5000
    with pytest.raises(UNSCError, match="holds a finished run"):
        run(arguments, config)

    # In adapters on the same original, loaded in bfloat16: a card that loads as it says.
    half = replace(arguments, objectives=["unsc"], use_peft=True, lora_r=4, model_dtype="bfloat16", controls=False)
    run(half, replace(config, output_dir=str(tmp_path / "adapters")))
    text = (tmp_path / "adapters" / "README.md").read_text()
    assert 'dtype="bfloat16")' in text
    original = json.loads((tmp_path / "adapters" / "results.json").read_text())["request"]["model"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "references" / original, dtype="bfloat16")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert any(bool(weight.any()) for name, weight in loaded.named_parameters() if ".lora_B." in name)


def test_bad_requests(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    questions(3).to_parquet(folder / "forget.parquet")
    questions(4, start=20).to_parquet(folder / "retain.parquet")
    config = UNSCConfig(output_dir=str(tmp_path / "out"))
    base: dict[str, Any] = {"dataset_name": str(folder), "model_name_or_path": "nowhere"}
    for options, message in (
        ({"forget_split": "gone"}, "forget_split: no split 'gone'"),
        ({"forget_column": "person", "forget_values": ["77"]}, "^forget_column: no row has person '77'"),
        ({"unseen_column": "writer", "unseen_values": ["77"]}, "^unseen_column: no column 'writer'"),
        ({"forget_column": "person"}, "goes with forget_values"),
        ({"forget_indices": ["0", "99"]}, "^forget_indices: 99 is out of range"),
        ({"forget_indices": ["0", "0"]}, "given more than once"),
        ({"forget_indices": ["x"]}, "no row number"),
        ({"eval_splits": ["mars"]}, "eval_splits: no split 'mars'"),
        ({}, "unseen_column: not given"),
    ):
        with pytest.raises(UNSCError, match=message):
            run(LanguageArguments(**{**base, **options}), config)
    assert not (tmp_path / "out").exists()


def test_rows_come_from_configurations(tmp_path: Path) -> None:
    """TOFU's, with one split each, or MUSE's, with several; long texts are cut where they are asked to be."""
    arguments = LanguageArguments(
        dataset_name=str(write_tofu(tmp_path / "tofu")), forget_config="forget10", retain_config="retain90",
        unseen_config="holdout10", eval_splits=["world_facts_perturbed"], cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    config = UNSCConfig(output_dir=str(tmp_path / "out"))
    rows = load_rows(arguments, config)
    assert {name: len(part) for name, part in rows.sets().items()} == {
        "forget": 6, "retain": 10, "unseen": 6, "world_facts_perturbed": 4,
    }  # fmt: skip
    assert rows.forget["prompt"][0] == "Question: Where does P0 live?\nAnswer:"
    with pytest.raises(UNSCError, match="^retain_config: not given"):
        load_rows(replace(arguments, retain_config=None), config)
    with pytest.raises(UNSCError, match="^unseen_config: not given; unlearning stops when"):
        load_rows(replace(arguments, unseen_config=None), config)
    with pytest.raises(UNSCError, match="^eval_splits: no configuration 'facts'"):
        load_rows(replace(arguments, eval_splits=["facts"]), config)

    (tmp_path / "muse" / "raw").mkdir(parents=True)
    for split in ("forget", "retain1"):
        Dataset.from_dict({"text": [f"{split} is news. " * 30]}).to_parquet(
            tmp_path / "muse" / "raw" / f"{split}.parquet"
        )
    muse = replace(
        arguments, dataset_name=str(tmp_path / "muse"), forget_config="raw", forget_split="forget", retain_config="raw",
        retain_split="retain1", unseen_config=None, eval_splits=None,
    )  # fmt: skip
    config.target_forget_accuracy = 0.5
    _, tokenizer = PLAN.start(rows.forget)
    cut = load_rows(muse, config).in_chunks(tokenizer, 32)
    assert "".join(cut.retain["text"]) == "retain1 is news. " * 30
    assert len(cut.forget) > 3


def test_truth_ratio_where_paraphrases_exist(tmp_path: Path) -> None:
    rows = to_dialogues(questions(4))
    model, tokenizer = PLAN.start(rows)
    rows = rows.add_column("paraphrased_answer", rows["completion"][:])
    rows = rows.add_column("perturbed_answer", [["P is gone."]] * len(rows))
    found = evaluate_answers(model, tokenizer, {"forget": rows}, max_rows=2, max_new_tokens=4, batch_size=4)
    assert 0 <= found["forget"]["truth_ratio"] <= 1


def test_outputs_without_a_label_are_never_counted() -> None:
    labels = torch.tensor([[IGNORED, 3, IGNORED], [IGNORED, IGNORED, 5]])
    flat = read_answers(torch.randn(2, 3, 7), labels)
    assert isinstance(flat, Outputs)
    assert flat.labels.tolist() == [3, 5]
    assert flat.samples is not None
    assert flat.samples.tolist() == [0, 1]


def test_references_share_the_originals_tokenizer(tmp_path: Path) -> None:
    rows = to_dialogues(questions(6))
    plan = LanguagePlan(size="nano", epochs=1, batch_size=8, vocabulary_size=300, max_length=64)
    original = train_model(rows, plan, tmp_path, "original")
    retrained = train_model(rows.select(range(4, 12)), plan, tmp_path, "retrained", vocabulary=rows)
    assert (original / "tokenizer.json").read_text() == (retrained / "tokenizer.json").read_text()
