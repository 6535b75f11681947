"""`unsc evaluate lm`: open-unlearning's numbers and files, what is left out, resuming, two processes, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tofu import CONFIGS, write_model, write_tofu
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from unsc_hf import UNSCError, evaluate_language_model
from unsc_hf.cli.main import main
from unsc_hf.evaluation.language.tofu import METRICS, MUSE, SUMMARY
from unsc_hf.runs.language_evaluation import EVAL, SETTINGS, SUMMARY_FILE

QUIET = ["--use_cpu", "--disable_tqdm", "--max_new_tokens", "8"]


def read(folder: Path, name: str = EVAL) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def differences(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Where two results differ by more than 1e-5, of the number where it is larger than 1."""
    if isinstance(theirs, dict):
        if set(ours) != set(theirs):
            yield f"{place}: {set(ours) ^ set(theirs)}"
        for key in set(ours) & set(theirs):
            yield from differences(ours[key], theirs[key], f"{place}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{place}[{i}]")
    elif isinstance(theirs, float):
        if abs(ours - theirs) > 1e-5 * max(1, abs(theirs)):
            yield f"{place}: {ours} and {theirs}"
    elif ours != theirs:
        yield f"{place}: {ours!r} and {theirs!r}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("tofu") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def words(model: Path, data: Path, out: Path, *more: Any) -> list[str]:
    given = ["--model_name_or_path", model, "--dataset_name", data, *CONFIGS, *QUIET, "--output_dir", out, *more]
    return ["evaluate", "lm", *map(str, given)]


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process wrote, with the model as its own reference."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert main(words(model, data, folder, "--reference_model", model)) == 0
    return folder


# ---- open-unlearning's numbers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["partial", "retrained"])
def test_every_number_is_open_unlearnings(name: str, golden_tofu: Path, tmp_path: Path) -> None:
    """Every metric of the summary, and every row: 1e-5, as theirs are rounded to float32."""
    logs = ["--retain_logs", golden_tofu / "open-unlearning" / "retrained.TOFU_EVAL.json"] if name == "partial" else []
    command = [
        "evaluate", "lm", "--model_name_or_path", golden_tofu / "models" / name, "--dataset_name", golden_tofu / "data",
        *CONFIGS, *logs, "--reference_model", golden_tofu / "models" / "retrained",
        "--prompt_template", r"Question: {prompt}\nAnswer:", "--output_dir", tmp_path / "out", "--disable_tqdm",
    ]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    theirs = read(golden_tofu / "open-unlearning", f"{name}.{EVAL}")
    theirs = {metric: result for metric, result in theirs.items() if result["agg_value"] is not None}
    assert not list(differences(read(tmp_path / "out"), theirs))
    summary = read(golden_tofu / "open-unlearning", f"{name}.{SUMMARY_FILE}")
    ours = read(tmp_path / "out", SUMMARY_FILE)
    assert list(ours) == list(summary)
    assert ours == pytest.approx(summary, abs=1e-5)


# ---- files -----------------------------------------------------------------------------------------------------------
def test_files_have_open_unlearnings_shape(finished: Path) -> None:
    results, summary = read(finished), read(finished, SUMMARY_FILE)
    no_rows = {"forget_quality", "ra_Q_A_PARA_Prob", "wf_Q_A_PARA_Prob"} | {name for name in MUSE if "mem_" in name}
    assert set(results) == set(METRICS) - no_rows
    assert list(results) == sorted(results)
    assert set(summary) == set(SUMMARY) - {"forget_quality"}
    assert summary["mia_reference"] == 0.5, "the reference is the model itself"
    assert set(results["forget_Q_A_ROUGE"]["value_by_index"]["0"]) == {
        "rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation",
    }  # fmt: skip
    assert len(results["forget_Q_A_PERT_Prob"]["value_by_index"]["5"]["prob"]) == 3
    assert set(results["mia_loss"]) == {"forget", "holdout", "auc", "agg_value"}
    assert read(finished, SETTINGS)["left_out"] == {"forget_quality": "no retain_logs were given"}


def test_own_files_are_retain_logs(model: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = evaluate_language_model(
        str(model), str(data), forget_config="forget10", retain_config="retain90", unseen_config="holdout10",
        retain_logs=str(finished / EVAL), metrics=["forget_quality", "privleak"], max_new_tokens=8, output_dir=str(out),
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert summary["forget_quality"] == 1.0
    assert summary["privleak"] == pytest.approx(0.0)


def test_metrics_without_their_data_are_named_and_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_tofu(tmp_path / "bare", with_perturbed=False)
    assert main(words(model, bare, tmp_path / "out")) == 0
    summary = read(tmp_path / "out", SUMMARY_FILE)
    assert "model_utility" not in summary
    assert "forget_truth_ratio" not in summary
    assert summary["forget_Q_A_Prob"] > 0
    left_out = read(tmp_path / "out", SETTINGS)["left_out"]
    assert left_out["forget_truth_ratio"] == "the set 'forget' has no column paraphrased_answer"
    assert left_out["mia_reference"] == "no reference_model was given"
    assert "Left out: model_utility (the set 'retain' has no column paraphrased_answer)." in capsys.readouterr().out


def test_an_interrupted_evaluation_goes_on(
    model: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished is not computed again, and the result is the same."""

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    command = words(model, data, tmp_path / "out", "--reference_model", model)
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "mia_min_k", killed)
        assert main(command) == 130
    before = read(tmp_path / "out")
    assert "forget_truth_ratio" in before
    assert "mia_min_k" not in before
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "forget_Q_A_ROUGE", killed)
        assert main(command) == 0
    assert read(tmp_path / "out") == read(finished)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([EVAL, SUMMARY_FILE, SETTINGS])


def test_an_adapter_is_evaluated(model: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    """An adapter that changes nothing has its base model's numbers."""
    base = write_model(tmp_path / "base")
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(model)
    adapter.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_text((model / name).read_text())
    assert main(words(tmp_path / "adapter", data, tmp_path / "out", "--metrics", "mia_loss", "mia_gradnorm")) == 0
    assert read(tmp_path / "out", SUMMARY_FILE)["mia_loss"] == read(finished, SUMMARY_FILE)["mia_loss"]


@pytest.mark.slow
def test_two_processes_give_identical_numbers(model: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "recipes" / "evaluate_lm.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    command = words(model, data, tmp_path / "out", "--reference_model", model)[2:]
    done = subprocess.run(
        [*launch, *command], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(differences(read(tmp_path / "out"), read(finished)))
    for name in ("forget_Q_A_Prob", "mia_min_k_plus_plus", "forget_Q_A_ROUGE"):
        assert read(tmp_path / "out")[name] == read(finished)[name]


def test_unlearning_writes_them_for_every_model(data: Path, tmp_path: Path) -> None:
    """Forget quality and utility of each model stand in results.json, and its files in a folder of its own."""
    command = [
        "unlearn", "lm", "--dataset_name", data, *CONFIGS, "--objectives", "npo", "--controls", "false",
        "--train_original", "--train_retrained", "--model_size", "nano", "--train_epochs", "8",
        "--train_batch_size", "8", "--max_new_tokens", "8", "--max_steps", "8", "--check_steps", "4", "--use_cpu",
        "--report_to", "none", "--disable_tqdm", "true", "--references_dir", tmp_path / "references", "--output_dir",
        tmp_path / "out",
    ]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    methods = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert set(methods) == {"original", "npo", "retrained"}
    for name, method in methods.items():
        summary = read(tmp_path / "out" / "evaluations" / name, SUMMARY_FILE)
        assert method["model_utility"] == summary["model_utility"]
        if name != "retrained":
            assert method["forget_quality"] == summary["forget_quality"] > 0
    assert (tmp_path / "out" / "evaluations" / "npo" / EVAL).is_file()


# ---- bad input -------------------------------------------------------------------------------------------------------
def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad command ends with."""
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--forget_config", "forget99"], "forget_config: no configuration 'forget99'"),
        (["--retain_config", "forget10"], "retain_config: 6 of its rows are in the forget set too"),
        (["--metrics", "truth"], "metrics: 'truth' does not exist; closest: "),
        (["--max_new_tokens", "0"], "max_new_tokens: got 0; choose a whole number of 1 or more."),
        (["--prompt_template", "Answer:"], "prompt_template: 'Answer:' has no {prompt}"),
        (["--chat_template_kwargs", "date"], "chat_template_kwargs: got 'date', but no chat template is used"),
        (["--system_prompt", "Hi"], "system_prompt: got 'Hi', but no chat template is used"),
        (["--retain_logs", "nowhere.json"], "retain_logs: nowhere.json cannot be read"),
        (["--reference_model", "nowhere"], "reference_model: cannot load 'nowhere'"),
        (["--model_name_or_path", "nowhere"], "model_name_or_path: cannot load 'nowhere'"),
        (["--forget_split", "test"], "forget_split: no split 'test' in 'forget10_perturbed'; splits found: train."),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(words(model, data, tmp_path / "out", *options), capsys)
    assert not (tmp_path / "out").exists()


def test_retain_logs_of_other_rows_or_another_size_are_refused(
    model: Path, data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(model, data, tmp_path / "out", "--retain_logs", tmp_path / EVAL)
    logs = read(finished)
    logs["forget_Q_A_ROUGE"]["value_by_index"]["1"]["ground_truth"] = "Somebody else."
    (tmp_path / EVAL).write_text(json.dumps(logs))
    assert "is of another data set (row 1 differs)" in refused(command, capsys)
    del logs["forget_truth_ratio"]["value_by_index"]["0"]
    (tmp_path / EVAL).write_text(json.dumps(logs))
    assert "is of another data set (5 rows, here are 6)" in refused(command, capsys)
    del logs["forget_truth_ratio"]
    (tmp_path / EVAL).write_text(json.dumps(logs))
    assert "has no forget_truth_ratio" in refused(command, capsys)
    (tmp_path / EVAL).write_text(json.dumps(read(finished)))
    (tmp_path / SETTINGS).write_text(json.dumps({**read(finished, SETTINGS), "parameters": 7}))
    assert "is of a model of 7 parameters" in refused(command, capsys)


def test_another_evaluation_is_not_continued(
    model: Path, data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(model, data, finished, "--reference_model", model, "--max_new_tokens", "9")
    assert "holds an evaluation with max_new_tokens 8, not 9" in refused(command, capsys)


def test_a_model_in_memory_and_splits(data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    rows = tmp_path / "splits"
    rows.mkdir()
    for split, name in (("forget", "forget10"), ("retain", "retain90")):
        (rows / f"{split}.json").write_text((data / f"{name}.json").read_text())
    summary = evaluate_language_model(
        model, str(rows), tokenizer=AutoTokenizer.from_pretrained(tmp_path / "model"), forget_split="forget",
        retain_split="retain", max_new_tokens=4, output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert set(summary) == {"exact_memorization", "extraction_strength", "forget_Q_A_Prob", "forget_Q_A_ROUGE"}
    with pytest.raises(UNSCError, match="^retain_split: no split 'kept'"):
        evaluate_language_model(model, str(rows), forget_split="forget", retain_split="kept")
    with pytest.raises(UNSCError, match="^retain_config: not given; name a configuration, or a split by retain_split"):
        evaluate_language_model(model, str(rows), forget_split="forget")
