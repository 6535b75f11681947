"""Plants faults in the mathematics, one at a time, and lists those that no test notices; `make mutants`.

    python tools/mutants.py [--only evaluation/verdict.py ...] [--sample 50 --seed 0] [--timeout 300]

A fault is another comparison, operator or number, a statement or an argument left out, or a condition turned round.
Annotations, messages of errors, devices and progress bars are left alone. It works in `build/mutants`, on a copy of the
last commit. A second call tries again only what no test had noticed, and what is new. `tools/mutants.md` says of known
survivors why they may survive.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "mutants"
KILLED = ROOT / "build" / "mutants-killed.json"
EXPLAINED = ROOT / "tools" / "mutants.md"

# Tests of each module.
TESTS = {
    "evaluation/verdict.py": "tests/evaluation/test_verdict.py tests/evaluation/test_engine.py",
    "objectives/pseudo_labels.py": "tests/objectives tests/tasks/test_causal_lm.py",
    "nullspace/rules.py": "tests/nullspace/test_subspace.py tests/nullspace/test_collect.py",
    "nullspace/subspace.py": "tests/nullspace/test_subspace.py",
    "nullspace/moments.py": "tests/nullspace/test_moments.py tests/nullspace/test_statistics.py",
    "nullspace/collect.py": "tests/nullspace/test_collect.py tests/nullspace/test_statistics.py",
    "nullspace/statistics.py": "tests/nullspace/test_statistics.py",
    "nullspace/projection.py": "tests/nullspace/test_projection.py tests/nullspace/test_api.py",
    "nullspace/lora.py": "tests/nullspace/test_api.py tests/trainer/test_adapters.py",
    "nullspace/memory.py": "tests/nullspace/test_memory.py",
    "nullspace/storage.py": "tests/nullspace/test_storage.py tests/nullspace/test_statistics.py",
    "nullspace/api.py": "tests/nullspace/test_api.py",
}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.MatMult: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Add, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


_Named = ast.FunctionDef | ast.ClassDef
_LEFT_ALONE = ("annotation", "returns", "decorator_list")
_NOT_SEEN = ("strict", "device", "progress", "description")  # arguments that change no figure on a CPU


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                yield _changed(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield _changed(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _changed(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif _is_flag(node):
        yield _changed(node, value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield _changed(node, value=2 * node.value if isinstance(node.value, float) and node.value else node.value + 1)
    elif isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in _NOT_SEEN and not _is_flag(keyword.value):
                yield _changed(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
    elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.UnaryOp):
        yield _changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant | ast.Yield):
        yield ast.Pass()
    if isinstance(node, ast.FunctionDef) and node.decorator_list:
        yield _changed(node, decorator_list=[])


def _is_flag(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def places(node: ast.AST, name: str = "") -> Iterator[tuple[ast.AST, str, int | None, ast.AST, str]]:
    """Every node in which a fault may be: its parent, the parent's field and index, and the function it is in."""
    for field, value in ast.iter_fields(node):
        if (
            field in _LEFT_ALONE
            or isinstance(node, ast.Raise)
            or (isinstance(node, ast.keyword) and node.arg in _NOT_SEEN)
        ):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(child, ast.AST):
                inside = f"{name}.{child.name}".lstrip(".") if isinstance(child, _Named) else name
                yield node, field, i, child, inside
                yield from places(child, inside)


def mutants(source: str) -> Iterator[tuple[str, int, str]]:
    """A name, the line and the source of each mutant of a module."""
    tree, seen = ast.parse(source), dict[str, int]()
    for parent, field, index, node, function in places(tree):
        for fault in faults(node):
            if index is None:
                setattr(parent, field, fault)
            else:
                getattr(parent, field)[index] = fault
            name = f"{function}: {_first_line(node)} -> {_first_line(fault)}"
            seen[name] = seen.get(name, 0) + 1
            name = name if seen[name] == 1 else f"{name} ({seen[name]})"
            yield name, getattr(node, "lineno", 0), ast.unparse(ast.fix_missing_locations(tree))
            if index is None:
                setattr(parent, field, node)
            else:
                getattr(parent, field)[index] = node


def _first_line(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(node)).split("\n")[0]


def passes(tests: str, timeout: float, imported: Path | None = None) -> bool:
    """Whether tests pass, in a process of their own that has other libraries imported already.

    `imported`: where to note what they imported.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(int(timeout))
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import pytest

    code = int(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=0", *tests.split()]))
    if imported is not None:
        own = ("unsc_hf", "helpers", "tests", "conftest", "test_", "__main__")
        imported.write_text("\n".join(name for name in sys.modules if not name.startswith(own)))
    os._exit(code)


def main() -> None:
    """Try the mutants of the modules that are asked for, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="MODULE")
    parser.add_argument("--sample", type=int, help="so many mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of a run of tests")
    options = parser.parse_args()
    if not COPY.exists():
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", COPY], cwd=ROOT, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    subprocess.run(["git", "checkout", "--quiet", "--force", "--detach", head.stdout.strip()], cwd=COPY, check=True)
    os.environ.update(TEST_SEED="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    os.chdir(COPY)
    sys.path[:0] = [str(COPY), str(COPY / "tests")]
    sys.dont_write_bytecode = True
    killed = set(json.loads(KILLED.read_text())) if KILLED.exists() else set()
    explained = EXPLAINED.read_text(encoding="utf-8") if EXPLAINED.exists() else ""
    for module in options.only:
        try_module(module, options, killed, explained)


def try_module(module: str, options: argparse.Namespace, killed: set[str], explained: str) -> None:
    """Try the mutants of one module."""
    file, imported = COPY / "unsc_hf" / module, ROOT / "build" / "mutants-imported"
    source = file.read_text(encoding="utf-8")
    if not passes(TESTS[module], 10 * options.timeout, imported):
        sys.exit(f"{module}: its tests fail as they are; run pytest {TESTS[module]}")
    for name in imported.read_text().split("\n"):
        try:
            __import__(name)
        except Exception:  # something that cannot be imported alone
            continue
    tried = list(mutants(source))
    if options.sample is not None:
        tried = random.Random(options.seed).sample(tried, min(options.sample, len(tried)))
    survived = []
    for name, line, text in tried:
        if f"{module} {name}" in killed:
            continue
        file.write_text(text, encoding="utf-8")
        if passes(TESTS[module], options.timeout):
            survived.append(name)
            print("  explained" if f"`{name}`" in explained else "  survived ", f"line {line}, {name}", flush=True)
        else:
            killed.add(f"{module} {name}")
            KILLED.write_text(json.dumps(sorted(killed), indent=0))
    file.write_text(source, encoding="utf-8")
    known = sum(f"`{name}`" in explained for name in survived)
    share = 1 - len(survived) / max(len(tried), 1)
    print(f"{module}: {len(tried)} mutants, {share:.0%} killed, {len(survived)} survived, {known} of them explained")


if __name__ == "__main__":
    main()
