"""Options that may be switched off are switched off by the word None, as their error messages say."""

from __future__ import annotations

from pathlib import Path

import pytest

from unsc_hf import UNSCConfig
from unsc_hf.cli.arguments import parse_arguments


@pytest.mark.parametrize(
    ("option", "number"),
    [("max_leak", 0.5), ("lr_doubling_steps", 7), ("max_rows_per_class", 9), ("target_forget_accuracy", 0.5)],
)
def test_none_switches_a_number_off(option: str, number: float, tmp_path: Path) -> None:
    given = ["--output_dir", str(tmp_path), "--use_cpu", f"--{option}"]
    for text, expected in (("None", None), (str(number), number)):
        (config,) = parse_arguments([UNSCConfig], [*given, text])
        assert getattr(config, option) == expected


def test_what_is_no_number_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([UNSCConfig], ["--output_dir", str(tmp_path), "--max_leak", "nothing"])
    assert "--max_leak" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # an option that must be a number
        parse_arguments([UNSCConfig], ["--output_dir", str(tmp_path), "--check_steps", "None"])
