"""A known vulnerability fails; a database that cannot be reached does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "audit_dependencies.py"
SOUND: dict[str, Any] = {"name": "torch", "version": "2.6.0", "vulns": []}
FAULTY = {**SOUND, "name": "pillow", "vulns": [{"id": "PYSEC-1", "fix_versions": ["12.0"]}]}
UNKNOWN = {"name": "numpy", "skip_reason": "Dependency not found on PyPI and could not be audited: numpy (2.0)"}


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ([SOUND, UNKNOWN], 0, "1 pinned packages, 0 known vulnerabilities."),
        ([SOUND, FAULTY], 1, "pillow 2.6.0: PYSEC-1, fixed in 12.0\naudit-dependencies: 2 pinned packages, 1 known"),
        ([UNKNOWN, UNKNOWN], 0, "cannot be reached"),
        (None, 0, "cannot be reached"),
    ],
)
def test_what_is_found_is_told(found: list[dict[str, Any]] | None, code: int, said: str, tmp_path: Path) -> None:
    answer = "Connection refused" if found is None else json.dumps({"dependencies": found, "fixes": []})
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit 1\n")
    program.chmod(0o755)
    done = subprocess.run([sys.executable, str(TOOL), str(program)], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stdout
