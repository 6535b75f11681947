"""Plants faults in the mathematics, one at a time, and lists those that no test notices; `make mutants`.

    python tools/mutants.py [--only evaluation/verdict.py ...] [--timeout 300]

It works in `build/mutants`, on a copy of the last commit. A second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "mutants"
PROGRAM = Path(sys.executable).with_name("cosmic-ray")

# Tests of each module.
TESTS = {
    "evaluation/verdict.py": "tests/evaluation/test_verdict.py",
    "objectives/pseudo_labels.py": "tests/objectives tests/tasks/test_causal_lm.py",
    "nullspace/rules.py": "tests/nullspace/test_subspace.py tests/nullspace/test_collect.py",
    "nullspace/subspace.py": "tests/nullspace/test_subspace.py",
    "nullspace/moments.py": "tests/nullspace/test_statistics.py",
    "nullspace/collect.py": "tests/nullspace/test_collect.py tests/nullspace/test_statistics.py",
    "nullspace/statistics.py": "tests/nullspace/test_statistics.py",
    "nullspace/projection.py": "tests/nullspace/test_projection.py tests/nullspace/test_api.py",
    "nullspace/lora.py": "tests/nullspace/test_api.py tests/trainer/test_adapters.py",
    "nullspace/memory.py": "tests/nullspace/test_memory.py",
    "nullspace/storage.py": "tests/nullspace/test_storage.py tests/nullspace/test_statistics.py",
    "nullspace/api.py": "tests/nullspace/test_api.py",
}

CONFIG = """[cosmic-ray]
module-path = "unsc_hf/{module}"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"
"""


def main() -> None:
    """Run the modules that are asked for, and print a report on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="MODULE")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of a run of tests")
    options = parser.parse_args()
    if not COPY.exists():
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", COPY], cwd=ROOT, check=True)
    paths = os.pathsep.join([str(COPY), str(COPY / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "TEST_SEED": "0", "HF_HUB_OFFLINE": "1"}
    for module in options.only:
        session, config = (COPY / (module.replace("/", "-") + ending) for ending in (".sqlite", ".toml"))
        content = {"module": module, "timeout": options.timeout, "python": sys.executable, "tests": TESTS[module]}
        config.write_text(CONFIG.format(**content))
        if not session.exists():
            subprocess.run([PROGRAM, "init", config, session], cwd=COPY, env=environment, check=True)
        subprocess.run([PROGRAM, "exec", config, session], cwd=COPY, env=environment, check=True)
        report = [PROGRAM.with_name("cr-report"), "--surviving-only", "--show-diff", session]
        subprocess.run(report, cwd=COPY, env=environment, check=True)


if __name__ == "__main__":
    main()
