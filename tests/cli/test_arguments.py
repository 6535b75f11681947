"""Options are read from words and files; those that may be switched off are switched off by the word None."""

from __future__ import annotations

from pathlib import Path

import pytest

from unsc_hf import UNSCConfig, UNSCError
from unsc_hf.cli.parser import OptionsParser
from unsc_hf.comparison.arguments import ImageArguments


@pytest.mark.parametrize(
    ("option", "number"),
    [("max_leak", 0.5), ("lr_doubling_steps", 7), ("rows_per_direction", 9), ("target_forget_accuracy", 0.5)],
)
def test_none_switches_a_number_off(option: str, number: float, tmp_path: Path) -> None:
    given = ["--output_dir", str(tmp_path), "--use_cpu", f"--{option}"]
    for text, expected in (("None", None), (str(number), number)):
        (config,) = OptionsParser([UNSCConfig]).parse([*given, text])
        assert getattr(config, option) == expected


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    parser = OptionsParser([UNSCConfig])
    with pytest.raises(UNSCError, match="^max_leak: got 'nothing', expected a number"):
        parser.parse(["--output_dir", str(tmp_path), "--max_leak", "nothing"])
    with pytest.raises(UNSCError, match="^check_steps: got 'None', expected a whole number"):
        parser.parse(["--output_dir", str(tmp_path), "--check_steps", "None"])


@pytest.mark.parametrize(
    ("text", "expected"), [("Shirt", ["Shirt"]), ("6", ["6"]), ("'35'", ["35"]), ("[3, 5]", ["3", "5"])]
)
def test_one_class_in_yaml_is_a_list_of_one(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"forget_classes: {text}\noutput_dir: {tmp_path}\n", encoding="utf-8")
    words = ["--config", str(tmp_path / "options.yaml"), "--use_cpu"]
    arguments, _ = OptionsParser((ImageArguments, UNSCConfig)).parse(words)
    assert arguments.forget_classes == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_steps: [1]", "^config: options.yaml sets max_steps to a list, expected one value"),
        ("max_steps: 3.5", "^max_steps: got '3.5', expected a whole number"),
    ],
)
def test_values_in_yaml_are_checked_as_words_are(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"{text}\noutput_dir: {tmp_path}\n", encoding="utf-8")
    with pytest.raises(UNSCError, match=said):
        OptionsParser((ImageArguments, UNSCConfig)).parse(["--config", str(tmp_path / "options.yaml"), "--use_cpu"])


def test_every_training_argument_is_an_option(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--adam_beta1", "0.8", "--max_leak", "0.1", "--use_cpu"]
    arguments, config = OptionsParser((ImageArguments, UNSCConfig)).parse(words)
    assert (config.adam_beta1, config.max_leak, arguments.dataset_name) == (0.8, 0.1, None)


def test_classes_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("frog\n\ntree frog\n", encoding="utf-8")
    request = ImageArguments(forget_classes=[str(file)]).request()
    assert request.forget_classes == ("frog", "tree frog")
    file.write_text("\n")
    for name, said in ((str(file), "names no class"), ("gone.txt", "cannot read gone.txt")):
        with pytest.raises(UNSCError, match=said):
            ImageArguments(forget_classes=[name]).request()
