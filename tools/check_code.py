"""Fails on long files, long functions, and private names used from outside.

    python tools/check_code.py

A private name (`_name`) belongs to the module that defines it. Another module must not import it, and must not read
it from an object, unless the name is defined by a library.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("unsc_hf",)
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80

# Files ("path") and functions ("path:name") that may be longer, each with its reason.
LONGER = {
    "unsc_hf/nullspace/statistics.py:ActivationStatistics.collect": "most of it documents the arguments",
}

# Private names of libraries that have no public counterpart, each with its reason.
PRIVATE = {
    "_DropoutNd": "torch: every kind of dropout",
    "_NormBase": "torch: every kind of batch norm",
    "_actions": "argparse: the options of a parser",
    "_exit": "os: documented, in spite of its name",
    "_fingerprint": "datasets: identifies a selection of rows",
    "_name_or_path": "transformers: where a model was loaded from",
    "_no_split_modules": "transformers: modules that sharding must not split",
    "_version": "torch: counts in-place changes of a tensor",
}


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a module with its qualified name."""
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        prefix, parent = pending.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = prefix + node.name
                pending.append((f"{name}.", node))
                if not isinstance(node, ast.ClassDef):
                    yield name, node
            else:
                pending.append((prefix, node))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a module defines: functions, classes, variables, fields and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that use a private name of another module."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if is_private(alias.name):
                    yield node.lineno, alias.name
        elif (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and not is_self(node.value)
            and node.attr not in own
            and node.attr not in PRIVATE
        ):
            yield node.lineno, node.attr


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a file, one line each."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    lines, tree = len(text.splitlines()), ast.parse(text)
    if lines > MOST_LINES_OF_A_FILE and name not in LONGER:
        yield f"{name}: {lines} lines, at most {MOST_LINES_OF_A_FILE}"
    for function, node in functions(tree):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MOST_LINES_OF_A_FUNCTION and f"{name}:{function}" not in LONGER:
            yield f"{name}:{node.lineno}: {function} has {length} lines, at most {MOST_LINES_OF_A_FUNCTION}"
    for line, used in private_uses(tree):
        yield f"{name}:{line}: uses the private name {used} of another module"


def main() -> int:
    found = [line for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) for line in problems(path)]
    print("\n".join(found) if found else "Lengths and private names are fine.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
