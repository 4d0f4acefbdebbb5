"""No data becomes code: nothing stored is unpickled, no script is built from data, no name is a pattern."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "agentperf_redis"
RUN_DATA = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve"}
"""Modules that may run code from the data that they load."""
ALLOWED = {"integrations/django.py": {"pickle"}}
"""Every Django backend pickles the values of its caches, because Django's interface allows any object as a value."""
WITH_PATTERNS = {"KEYS", "PSUBSCRIBE", "MATCH"}
"""Commands and options that take a pattern. A long pattern blocks or crashes some servers (CVE-2024-31228)."""
NAMESPACES_ONLY = {
    "views/scanning.py": {"MATCH"},  # the calls of Scan pass the pattern, and `foreign_scans` checks these calls
    "script_header.py": {"KEYS"},  # the name of a section in the header of a script
}


WORDS = re.compile(rf"\b(?:{'|'.join([*RUN_DATA, *WITH_PATTERNS])}|(?:eval|exec|__import__|Script|Scan)\()")
"""Matches a word that every fault has. Modules without such a word are not checked, because a check takes long."""


@cache
def sources() -> tuple[tuple[str, ast.Module], ...]:
    """Return the modules that contain a word in `WORDS`, each with its path in the package."""
    texts = ((path, path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py")))
    return tuple((str(path.relative_to(PACKAGE)), ast.parse(text)) for path, text in texts if WORDS.search(text))


def runs_data(tree: ast.Module) -> set[str]:
    """Return a module's imports and calls that can execute data."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & RUN_DATA
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} & RUN_DATA
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & {"eval", "exec", "__import__"}
    return found


def built_scripts(tree: ast.Module) -> list[int]:
    """Return the lines on which a script is built from something other than literals."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Script"
        and not all(isinstance(each, ast.Constant) for each in (*node.args, *(word.value for word in node.keywords)))
    ]


def with_patterns(tree: ast.Module) -> set[str]:
    """Return the commands and options that take a pattern and occur as literals in a module."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in WITH_PATTERNS}


def foreign_scans(tree: ast.Module) -> list[int]:
    """Return the lines on which a scan gets a pattern that contains more than literals and a namespace."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Scan"
        and not all(isinstance(each, ast.Constant) or is_namespace(each) for each in parts(node.args[1]))
    ]


def parts(pattern: ast.expr) -> list[ast.expr]:
    """Return the parts of an f-string. Any other expression is returned as a single part."""
    return pattern.values if isinstance(pattern, ast.JoinedStr) else [pattern]


def is_namespace(part: ast.expr) -> bool:
    value = part.value if isinstance(part, ast.FormattedValue) else part
    return isinstance(value, ast.Attribute) and value.attr == "namespace"


def test_no_module_runs_what_is_stored() -> None:
    found = {path: runs_data(tree) for path, tree in sources()}
    assert {path: names for path, names in found.items() if names} == ALLOWED


def test_every_script_is_a_literal() -> None:
    found = {path: built_scripts(tree) for path, tree in sources()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_patterns_are_made_of_namespaces_only() -> None:
    found = {path: with_patterns(tree) for path, tree in sources()}
    assert {path: words for path, words in found.items() if words} == NAMESPACES_ONLY
    scans = {path: foreign_scans(tree) for path, tree in sources()}
    assert {path: lines for path, lines in scans.items() if lines} == {}


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (runs_data, "import pickle"),
        (runs_data, "def f():\n    from marshal import loads"),
        (runs_data, "eval(text)"),
        (built_scripts, "Script(name)"),
        (built_scripts, 'Script("a", f"return {value}")'),
        (built_scripts, 'Script("a", source="return " + value)'),
        (foreign_scans, 'Scan(backend, f"{backend.namespace}:{name}*")'),
        (foreign_scans, "Scan(backend, pattern)"),
        (with_patterns, 'Command("KEYS", (), (pattern,), list)'),
    ],
)
def test_fault_is_detected(check: object, source: str) -> None:
    assert callable(check)
    assert check(ast.parse(source))
