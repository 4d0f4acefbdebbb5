"""Tests of the demo's agents. They work on real source, and never execute it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from agentperf_redis.codec.codec import Codec
from agentperf_redis.demo import agents
from agentperf_redis.demo.agents import Finding, Import, Outline
from agentperf_redis.demo.tree import find_tree, standard_library
from agentperf_redis.errors import InvalidArgument


def source(text: str) -> bytes:
    return dedent(text).lstrip("\n").encode()


def function(text: str) -> agents.Function:
    node = ast.parse(source(text)).body[0]
    assert isinstance(node, agents.Function)
    return node


def test_reader_outlines_functions_classes_and_imports() -> None:
    outline = agents.read(
        source(
            """
            import os, json.decoder
            from collections import OrderedDict as O, deque
            from . import sibling
            from .sibling import name
            from ..other.part import *

            class A:
                def method(self):
                    async def inner(): ...
            def top():
                pass
            """
        ),
        "pack.age.module",
        is_package=False,
    )
    assert outline == Outline(
        lines=11,
        functions=(("method", 8, 2), ("inner", 9, 1), ("top", 10, 2)),
        classes=("A",),
        imports=(
            Import(1, "json.decoder"),
            Import(1, "os"),
            Import(2, "collections", ("OrderedDict", "deque")),
            Import(3, "pack.age", ("sibling",)),
            Import(4, "pack.age.sibling", ("name",)),
            Import(5, "pack.other.part", ("*",)),
        ),
    )


def test_relative_imports_resolve_against_the_package() -> None:
    assert agents.read(b"from .x import y", "pack", is_package=True).imports == (Import(1, "pack.x", ("y",)),)
    assert agents.read(b"from .x import y", "script", is_package=False).imports == ()


@pytest.mark.parametrize("broken", [b"def f(:", b"x = '\x00'", b"# coding: nonsense\n", b"\xff\xfe"])
def test_source_that_does_not_parse_is_reported(broken: bytes) -> None:
    assert agents.read(broken, "m", is_package=False).error
    assert [finding.kind for finding in agents.criticise(broken)] == ["does not parse"]


@pytest.mark.parametrize(
    ("text", "complexity"),
    [
        ("def f(): pass", 1),
        ("def f(a):\n if a: pass\n elif a > 1: pass\n else: pass", 3),
        ("def f(a):\n for x in a:\n  while x: pass", 3),
        ("def f(a, b, c): return a and b and c or a", 4),
        ("def f(a): return [x for x in a if x if x > 1]", 4),
        ("def f(a):\n try: pass\n except A: pass\n except B: pass\n finally: pass", 3),
        ("def f(a): return 1 if a else 2", 2),
        ("def f(a):\n match a:\n  case 1: pass\n  case 2: pass", 3),
        ("def f(a):\n def g(b):\n  if b: pass\n if a: pass", 2),
        ("async def f(a):\n async for x in a: assert x", 3),
    ],
)
def test_complexity_follows_mccabes_definition(text: str, complexity: int) -> None:
    assert agents.complexity(function(text)) == complexity


def kinds(text: str) -> list[tuple[str, str]]:
    return [(finding.kind, finding.name) for finding in agents.criticise(source(text))]


def test_critic_requires_docstrings_on_public_names_only() -> None:
    assert kinds(
        """
        class A:
            '''Said.'''
            def public(self):
                return 1
            def _private(self):
                return 1
        class _B: pass
        """
    ) == [("no docstring", "the module"), ("no docstring", "public")]
    assert agents.criticise(b"") == ()


def test_critic_finds_complex_long_deep_and_wide_functions() -> None:
    def branches(count: int) -> str:
        return "def f(a):\n" + "".join(f"    if a == {n}: return {n}\n" for n in range(count))

    assert ("complex", "f") in kinds(branches(10))
    assert ("complex", "f") not in kinds(branches(9))
    assert ("long", "f") in kinds("def f():\n" + "    x = 1\n" * 60)
    assert ("long", "f") not in kinds("def f():\n" + "    x = 1\n" * 59)
    deep = "".join(" " * n + "if a:\n" for n in range(1, 7))
    assert ("deep", "f") in kinds(f"def f(a):\n{deep}       pass\n")
    elifs = "".join(f"    elif a == {n}: pass\n" for n in range(8))
    assert ("deep", "f") not in kinds(f"def f(a):\n    if a: pass\n{elifs}")
    assert ("many arguments", "f") in kinds("def f(a, b, c, /, d, e, *, f, g, h): pass")


def test_critic_finds_mutable_defaults_and_bare_excepts() -> None:
    assert ("mutable default", "f") in kinds("def f(a=[]): pass")
    assert ("mutable default", "f") not in kinds("def f(a=()): pass")
    assert ("bare except", "") in kinds("try: pass\nexcept: pass")
    assert ("bare except", "") not in kinds("try: pass\nexcept:\n    raise")


def test_critic_handles_expressions_deeper_than_the_stack() -> None:
    assert agents.criticise(b"'''d'''\nx = " + b"1 + " * 900 + b"1") == ()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of modules. Executing one of the modules would create the file `executed`."""
    package = tmp_path / "pack"
    package.mkdir()
    run = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    (package / "__init__.py").write_text(run + "from .part import *\nVALUE: int = 1\n")
    (package / "part.py").write_text(run + "__all__ = ['shown', '_listed']\n__all__ += ('more',)\ndef shown(): pass\n")
    (package / "loop.py").write_text("from .loop import *\nx, (y, *z) = 1, (2, 3)\n")
    (package / "cases.py").write_text(
        "import a.b, c as d\nfrom e import f as g\n_hidden = 1\n"
        "if x:\n    in_if = 1\nelse:\n    in_else = 1\ntry:\n    in_try = 1\nexcept E:\n    in_except = 1\n"
        "for in_for in []: pass\nwith open('') as in_with: pass\ndef fn():\n    inside = 1\nclass Cls:\n    attribute = 1\n"
    )
    (package / "broken.py").write_text("def")
    return tmp_path


def test_librarian_reads_names_without_executing_modules(library: Path) -> None:
    search = [str(library)]
    assert agents.public_names("pack.part", search) == ("_listed", "more", "shown")
    assert agents.public_names("pack", search) == (
        "VALUE", "_listed", "broken", "cases", "loop", "more", "part", "shown",
    )  # fmt: skip
    assert agents.public_names("pack.loop", search) == ("x", "y", "z")
    assert agents.public_names("pack.cases", search) == (
        "Cls", "a", "d", "fn", "g", "in_else", "in_except", "in_for", "in_if", "in_try", "in_with",
    )  # fmt: skip
    assert not (library / "executed").exists()
    assert "pack" not in sys.modules


@pytest.mark.parametrize("module", ["sys", "nowhere", "pack.nowhere", "pack.part.deeper", "pack.broken", ""])
def test_librarian_returns_none_without_readable_source(library: Path, module: str) -> None:
    assert agents.public_names(module, [str(library)]) is None


def test_librarian_reads_the_standard_library() -> None:
    import json

    search = [str(standard_library())]
    assert set(json.__all__) <= set(agents.public_names("json", search) or ())
    assert {"environ", "path", "walk"} <= set(agents.public_names("os", search) or ())


def test_summariser_weighs_findings_and_private_imports() -> None:
    findings = (
        Finding("complex", 5, "f", 7, ""),
        Finding("no docstring", 1, "m", 2, ""),
        Finding("complex", 9, "g", 1, ""),
    )
    outline = Outline(
        20,
        imports=(
            Import(3, "known", ("fine", "_private", "gone", "*", "__doc__")),
            Import(4, "unknown", ("anything",)),
            Import(5, "known"),
        ),
    )
    review = agents.summarise("a.py", outline, findings, {"known": ("fine",), "unknown": None})
    assert (review.points, review.lines) == (12, 20)
    assert review.kinds == (("complex", 2), ("no docstring", 1), ("private import", 1))
    assert [(finding.kind, finding.line) for finding in review.worst] == [
        ("complex", 5), ("no docstring", 1), ("private import", 3),
    ]  # fmt: skip
    assert review.worst[2].detail == "takes _private, gone"


def test_agent_results_survive_the_codec() -> None:
    outline = agents.read(b"import os\ndef f(): pass\nclass A: pass\n", "m", is_package=False)
    review = agents.summarise("m.py", outline, agents.criticise(b"def f(a=[]): pass"), {})
    for value in (outline, review, agents.criticise(b"def f(a=[]): pass")):
        back = Codec().decode(Codec().encode(value))
        assert back == value
        assert type(back) is type(value)


def test_tree_excludes_tests_and_foreign_folders(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/c.py",
        "a/tests/t.py",
        "site-packages/x.py",
        ".hidden/y.py",
        "a/d.txt",
        "a/__pycache__/z.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tree = find_tree(tmp_path, None)
    assert tree.files == ("a/c.py", "b.py")
    assert tree.module_name("a/c.py") == "a.c"
    assert find_tree(tmp_path, 1).files == ("a/c.py",)


def test_tree_inside_a_package_keeps_full_module_names(tmp_path: Path) -> None:
    inner = tmp_path / "pack" / "inner"
    inner.mkdir(parents=True)
    for file in (tmp_path / "pack" / "__init__.py", inner / "__init__.py", inner / "m.py"):
        file.touch()
    tree = find_tree(inner, None)
    assert [tree.module_name(file) for file in tree.files] == ["pack.inner", "pack.inner.m"]
    assert tree.search[0] == str(tmp_path)


@pytest.mark.thorough
def test_default_tree_samples_the_standard_library_evenly() -> None:
    everything = find_tree(None, None)
    assert {"ast.py", "json/decoder.py", "asyncio/locks.py"} <= set(everything.files)
    assert not any("test" in Path(file).parts[:-1] for file in everything.files)
    some = find_tree(None, 40).files
    assert len(some) == 40
    assert set(some) <= set(everything.files)
    assert some[-1] > "u"


def test_tree_without_python_files_is_rejected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidArgument, match="path"):
            find_tree(path, None)
