"""Looks the pinned versions up in PyPI's database of known vulnerabilities; `make audit-dependencies`.

    python tools/audit_dependencies.py build/audit/bin/pip-audit

It fails where a pinned version has one. Where the database cannot be reached it says so in one line, and does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "constraints.txt"


def look_up(program: str, seconds: float = 240.0) -> list[dict[str, Any]]:
    """What pip-audit found on each pinned package that the database knows: `name`, `version` and `vulns`."""
    words = [program, "--requirement", str(PINS), "--no-deps", "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run(
            [*words, "--progress-spinner", "off"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=seconds,
        )  # fmt: skip
        return [package for package in json.loads(done.stdout)["dependencies"] if "vulns" in package]
    except (subprocess.TimeoutExpired, ValueError):
        return []


def main() -> None:
    """Print what is known, and exit with 1 where anything is."""
    known = look_up(sys.argv[1])
    if not known:
        print("audit-dependencies: the database of vulnerabilities cannot be reached, so nothing was looked up.")
        return
    found = [(package, fault) for package in known for fault in package["vulns"]]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    print(f"audit-dependencies: {len(known)} pinned packages, {len(found)} known vulnerabilities.")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
