"""The agents of a code review: a reader, a critic, a librarian and a summariser of real source files.

All agents are pure functions of source text and of module locations. They never execute or import the source that they
read. Their results can be cached, because the result types are registered with the codec.

The complexity of a function is the number of its decisions + 1. Source: T. J. McCabe, A Complexity Measure, IEEE TSE
SE-2 (4), 1976.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, PathFinder
from pathlib import Path

from agentperf_redis.codec.storable import REGISTRY

COMPLEX_FROM = 11
"""Lowest cyclomatic complexity that counts as a finding. McCabe's own limit is 10."""
LONG_FROM = 61
"""Lowest number of lines of a function that counts as a finding: more lines than fit on a screen."""
DEEP_FROM = 6
"""Lowest number of nested blocks in a function that counts as a finding."""
MANY_ARGUMENTS_FROM = 8
_SHOWN_FINDINGS = 3
_STAR_DEPTH = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
_DECISIONS = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.Assert,
    ast.comprehension,
    ast.match_case,
)
_MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


@dataclass(frozen=True, slots=True)
class Import:
    """An import: the absolute name of the module, and the names imported from it, if any."""

    line: int
    module: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outline:
    """The reader's result for a file. If the file does not parse, only `lines` and `error` are set."""

    lines: int
    functions: tuple[tuple[str, int, int], ...] = ()
    """Name, first line and number of lines of each function."""
    classes: tuple[str, ...] = ()
    imports: tuple[Import, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of the critic."""

    kind: str
    line: int
    name: str
    points: int
    detail: str


@dataclass(frozen=True, slots=True)
class Review:
    """The summariser's result for a file."""

    path: str
    lines: int
    points: int
    kinds: tuple[tuple[str, int], ...]
    """Kinds of findings and their counts, the most frequent first."""
    worst: tuple[Finding, ...]


for _kind in (Import, Outline, Finding, Review):
    REGISTRY.add(_kind, name=f"agentperf.demo.{_kind.__name__}")


def read(source: bytes, module: str, *, is_package: bool) -> Outline:
    """Outline a file: the reader's work.

    Args:
        source: bytes of the file.
        module: absolute dotted name of the file's module; relative imports are resolved against this name.
        is_package: whether the file is an ``__init__.py``.

    Returns:
        The functions, classes and imports of the file.
    """
    lines = source.count(b"\n") + (not source.endswith(b"\n") and bool(source))
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        return Outline(lines, error=f"{type(error).__name__}: {error}")
    package = module if is_package else module.rpartition(".")[0]
    functions, classes, imports = [], [], []
    for node in _walk(tree):
        if isinstance(node, Function):
            functions.append((node.name, node.lineno, _length(node)))
        elif isinstance(node, ast.ClassDef):
            classes.append(node.name)
        elif isinstance(node, ast.Import):
            imports += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += _imports_from(node, package)
    by_line = sorted(imports, key=lambda each: (each.line, each.module))
    return Outline(lines, tuple(sorted(functions, key=lambda each: each[1])), tuple(classes), tuple(by_line))


def criticise(source: bytes) -> tuple[Finding, ...]:
    """Find the parts of a file that are hard to maintain: the critic's work.

    Args:
        source: bytes of the file.

    Returns:
        All findings, ordered by points, the highest first.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        return (Finding("does not parse", getattr(error, "lineno", None) or 1, "", 50, type(error).__name__),)
    findings = []
    if not ast.get_docstring(tree, clean=False) and tree.body:
        findings.append(Finding("no docstring", 1, "the module", 2, ""))
    for node in _walk(tree):
        if isinstance(node, Function):
            findings += _criticise_function(node)
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("_") and not ast.get_docstring(node, clean=False):
                findings.append(Finding("no docstring", node.lineno, node.name, 1, ""))
        elif isinstance(node, ast.ExceptHandler) and node.type is None and not _reraises(node):
            findings.append(Finding("bare except", node.lineno, "", 3, "catches KeyboardInterrupt and SystemExit too"))
    return tuple(sorted(findings, key=_weight))


def public_names(module: str, search: Sequence[str]) -> tuple[str, ...] | None:
    """Find the public names of a module in its source, without importing the module. This is the librarian's work.

    The public names are those in ``__all__`` and every top-level name that does not begin with ``_``.
    ``from x import *`` is followed. The submodules of a package are also public names of the package.

    Args:
        module: absolute dotted name.
        search: folders in which the module is looked up, as in ``sys.path``.

    Returns:
        The names, sorted; None if there is no source, as for a builtin, or no such module.
    """
    names = _names_of(module, search, _STAR_DEPTH)
    return None if names is None else tuple(sorted(names))


def summarise(
    path: str, outline: Outline, findings: Iterable[Finding], libraries: dict[str, tuple[str, ...] | None]
) -> Review:
    """Combine the results of the other agents for a file: the summariser's work.

    Args:
        path: name of the file in the review.
        outline: the reader's result.
        findings: the critic's findings.
        libraries: public names by module, from the librarian.

    Returns:
        The review. An imported name that is not public in its module adds a finding.
    """
    everything = list(findings)
    for each in outline.imports:
        known = libraries.get(each.module)
        if known is None:
            continue
        missing = sorted(name for name in set(each.names) - set(known) - {"*"} if not name.startswith("__"))
        if missing:
            everything.append(
                Finding("private import", each.line, each.module, len(missing), "takes " + ", ".join(missing))
            )
    everything.sort(key=_weight)
    kinds = Counter(each.kind for each in everything)
    return Review(
        path,
        outline.lines,
        sum(each.points for each in everything),
        tuple(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        tuple(everything[:_SHOWN_FINDINGS]),
    )


def complexity(function: Function) -> int:
    """Return McCabe's cyclomatic complexity of a function; nested functions count separately."""
    decisions = 1
    for node in _walk(function, into_functions=False):
        if isinstance(node, _DECISIONS):
            decisions += 1
            if isinstance(node, ast.comprehension):
                decisions += len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            decisions += len(node.values) - 1
    return decisions


def _criticise_function(node: Function) -> Iterator[Finding]:
    decisions, lines, depth = complexity(node), _length(node), _depth(node)
    if decisions >= COMPLEX_FROM:
        detail = f"cyclomatic complexity {decisions}"
        yield Finding("complex", node.lineno, node.name, decisions - COMPLEX_FROM + 1, detail)
    if lines >= LONG_FROM:
        yield Finding("long", node.lineno, node.name, (lines - LONG_FROM) // 20 + 1, f"{lines} lines")
    if depth >= DEEP_FROM:
        yield Finding("deep", node.lineno, node.name, 2 * (depth - DEEP_FROM + 1), f"{depth} blocks deep")
    arguments = node.args
    count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
    if count >= MANY_ARGUMENTS_FROM:
        yield Finding("many arguments", node.lineno, node.name, count - MANY_ARGUMENTS_FROM + 1, f"{count} arguments")
    if not node.name.startswith("_") and not ast.get_docstring(node, clean=False) and lines > 1:
        yield Finding("no docstring", node.lineno, node.name, 1, "")
    for default in (*arguments.defaults, *arguments.kw_defaults):
        if isinstance(default, _MUTABLE):
            yield Finding("mutable default", default.lineno, node.name, 3, "shared by all calls")


def _weight(finding: Finding) -> tuple[int, int, str, str]:
    return -finding.points, finding.line, finding.kind, finding.name


def _walk(root: ast.AST, *, into_functions: bool = True) -> Iterator[ast.AST]:
    """Yield all nodes below a node, without recursion, because generated source may nest deeper than Python's stack."""
    stack = list(ast.iter_child_nodes(root))
    while stack:
        node = stack.pop()
        yield node
        if into_functions or not isinstance(node, Function):
            stack.extend(ast.iter_child_nodes(node))


def _length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _depth(function: Function) -> int:
    """Return how deeply the blocks of a function nest. An ``elif`` is no deeper than its ``if``."""
    deepest = 0
    stack: list[tuple[ast.AST, int]] = [(child, 0) for child in function.body]
    while stack:
        node, depth = stack.pop()
        if isinstance(node, (Function, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, _BLOCKS):
            depth += 1
            deepest = max(deepest, depth)
        for child in ast.iter_child_nodes(node):
            is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
            stack.append((child, depth - is_elif))
    return deepest


def _reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is None for node in _walk(handler, into_functions=False))


def _imports_from(node: ast.ImportFrom, package: str) -> list[Import]:
    names = tuple(alias.name for alias in node.names)
    if node.level == 0:
        return [Import(node.lineno, node.module or "", names)]
    parts = package.split(".") if package else []
    if node.level - 1 >= len(parts):
        return []  # the import leads above the top folder: the import is broken, or the importing file is in no package
    base = ".".join(parts[: len(parts) - node.level + 1])
    return [Import(node.lineno, f"{base}.{node.module}" if node.module else base, names)]


def _names_of(module: str, search: Sequence[str], star_depth: int) -> set[str] | None:
    found = _find_source(module, search)
    if found is None:
        return None
    source, is_package, beside = found
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in _top_level(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)) and _assigns_all(node):
            names |= _spelled_names(node.value)
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            for each in _imports_from(node, package):
                if star_depth > 0:
                    names |= _names_of(each.module, search, star_depth - 1) or set()
        names |= {name for name in _bound_by(node) if not name.startswith("_")}
    if is_package:
        names |= {name for folder in beside for name in _submodules(folder)}
    return names


def _find_source(module: str, search: Sequence[str]) -> tuple[bytes, bool, list[str]] | None:
    """Return a module's source, whether it is a package, and its submodules' folders; None if there is no source.

    `importlib.util.find_spec` would import the parents of a dotted name. The path finder imports nothing, so it is
    called here for each part of the name.
    """
    path: list[str] = list(search)
    spec = None
    for end in range(module.count(".") + 1):
        name = ".".join(module.split(".")[: end + 1])
        if end == 0 and BuiltinImporter.find_spec(name) is not None:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return Path(spec.origin).read_bytes(), spec.submodule_search_locations is not None, path
    except OSError:
        return None


def _submodules(folder: str) -> set[str]:
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError:
        return set()
    return {
        entry.name.split(".")[0]
        for entry in entries
        if entry.suffix in {".py", ".so"} or (entry.is_dir() and entry.name.isidentifier())
    } - {"__init__", "__main__", "__pycache__"}


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, even in ``if``, ``try`` and loops, but not in functions or classes."""
    stack: list[ast.stmt] = list(reversed(tree.body))
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, (*_BLOCKS, ast.ExceptHandler)) and not isinstance(node, ast.Match):
            inside: list[ast.stmt] = []
            for field in ("body", "handlers", "orelse", "finalbody"):
                inside += getattr(node, field, [])
            stack += reversed(inside)


def _assigns_all(node: ast.Assign | ast.AugAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def _spelled_names(value: ast.expr) -> set[str]:
    """Return the strings of a literal list; an empty set for a computed list."""
    try:
        names = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, (list, tuple)) else set()


def _bound_by(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names} - {"*"}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For, ast.AsyncFor)):
        targets = [node.target]
    elif isinstance(node, (ast.With, ast.AsyncWith)):
        targets = [item.optional_vars for item in node.items if item.optional_vars is not None]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
