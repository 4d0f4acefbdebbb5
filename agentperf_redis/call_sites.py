"""The calls in a source file. Each call is named after the module variable, attribute or function it belongs to.

A name does not contain line numbers, so it survives edits elsewhere in the file. The name contains the text of the
called function, unless that function is one of the usual constructors. So no call of another function has the same name
as the call of a usual constructor. Two calls in a file never have the same name: calls of the same function with the
same target are numbered, such as ``users-1of2``. When one of these calls is added or removed, the total changes. So all
of them get new names, and none gets a name that another call had before.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

Position: TypeAlias = tuple[int, int]
"""Line, from 1, and column in bytes, from 0. The position of its end identifies a call, since no two calls share it."""


@dataclass(frozen=True, slots=True)
class CallSite:
    """A call in a source file.

    Attributes:
        name: such as ``users``, ``Agent.cache`` or ``make``; unique in its file. A call that is neither assigned nor
            inside a function has the call itself as its name, such as ``LRUCache()``. So its name differs from those of
            all variables.
        callee: the text of the function called, such as ``LRUCache`` or ``self.factory``; see `_text`.
        scope: the function whose body contains the call, as `types.CodeType` names it; ``<module>`` for a call outside
            functions.
        scope_line: the first line of that function, decorators included.
        repeats: whether the call is in a loop or a comprehension.
    """

    name: str
    callee: str
    scope: str
    scope_line: int
    repeats: bool


class _Scope(NamedTuple):
    """Where an expression is."""

    path: tuple[str, ...] = ()
    """Names of the enclosing classes and functions."""
    self_name: str = ""
    """The first parameter of a method; `_CLASS_BODY` in the body of a class; otherwise empty."""
    code: str = "<module>"
    line: int = 1
    target: str = ""
    """The target to which the value of the expression is assigned; empty if the value is not assigned."""
    repeats: bool = False


_CLASS_BODY: Final = "class"
"""The value of `self_name` in the body of a class. It is a keyword of Python, so no parameter has this name."""
_PLAIN_KEYWORDS: Final = frozenset({"default", "default_factory", "factory"})
"""Keywords that are left out of names of places: ``users = field(default_factory=LRUCache)`` is called ``users``."""
_WITHOUT_CALLS: Final = frozenset({ast.Name, ast.Constant, ast.Import, ast.ImportFrom, ast.Pass, ast.Load, ast.Store})
"""Frequent kinds of nodes that contain no calls, so they need no visit."""
_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
_Comprehension: TypeAlias = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def call_sites(source: str, usual: Iterable[str]) -> dict[Position, CallSite]:
    """Return the calls in a module, by the position of their end.

    Args:
        source: the text of a module.
        usual: names of the usual constructors. The name of a call of a usual constructor does not contain its text.

    Raises:
        SyntaxError: the text is not Python.
        RecursionError: the code is nested too deeply.
    """
    finder = _Finder(frozenset(usual))
    finder.visit(ast.parse(source), _Scope())
    found = sorted(finder.found)
    totals = Counter(name for _, name, _ in found)
    numbers: Counter[str] = Counter()
    sites = {}
    for end, name, (callee, scope) in found:
        numbers[name] += 1
        numbered = name if totals[name] == 1 else f"{name}-{numbers[name]}of{totals[name]}"
        sites[end] = CallSite(numbered, callee, scope.code, scope.line, scope.repeats)
    return sites


class _Finder:
    """Finds the calls in a syntax tree, and the scope of each call."""

    def __init__(self, usual: frozenset[str]) -> None:
        self._usual = usual
        self.found: list[tuple[Position, str, tuple[str, _Scope]]] = []
        """For each call: the position of its end, its name before numbering, its callee and its scope."""
        self._methods: dict[type[ast.AST], Callable[[Any, _Scope], None]] = {
            ast.Call: self._call,
            ast.FunctionDef: self._function,
            ast.AsyncFunctionDef: self._function,
            ast.ClassDef: self._class,
            ast.Assign: self._assign,
            ast.AnnAssign: self._assign_one,
            ast.AugAssign: self._assign_one,
            ast.NamedExpr: self._assign_one,
            ast.For: self._for,
            ast.AsyncFor: self._for,
            ast.While: self._while,
            ast.withitem: self._with_item,
            ast.Dict: self._dict,
            ast.Lambda: self._lambda,
            ast.ListComp: self._comprehension,
            ast.SetComp: self._comprehension,
            ast.DictComp: self._comprehension,
            ast.GeneratorExp: self._comprehension,
        }

    def visit(self, node: ast.AST, scope: _Scope) -> None:
        """Find the calls in a node."""
        method = self._methods.get(type(node))
        if method is not None:
            method(node, scope)
        elif type(node) not in _WITHOUT_CALLS:
            for part in ast.iter_child_nodes(node):
                self.visit(part, scope)

    def _visit_all(self, nodes: Iterable[ast.AST | None], scope: _Scope) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node, scope)

    def _call(self, node: ast.Call, scope: _Scope) -> None:
        callee = _text(node.func)
        end = (node.end_lineno or 0, node.end_col_offset or 0)
        self.found.append((end, self._name(scope, callee), (callee, scope)))
        self.visit(node.func, scope)
        self._visit_all(node.args, scope)
        for keyword in node.keywords:
            plain = keyword.arg is None or keyword.arg in _PLAIN_KEYWORDS
            self.visit(keyword.value, scope if plain else _within(scope, str(keyword.arg), f"{callee}()"))

    def _name(self, scope: _Scope, callee: str) -> str:
        target, path = scope.target, scope.path
        if target.startswith("."):  # an attribute of `self`: the resulting name includes the class, but not the method
            target, path = target[1:], path[:-1]
        in_function = bool(path) and scope.self_name != _CLASS_BODY
        if not target and not in_function:
            return ".".join((*path, f"{callee}()"))
        name = ".".join((*path, target) if target else path)
        # Two calls may have the same target, such as f and g in x = f(g()). So the name also contains the called
        # function, unless that function is a usual constructor.
        return name if callee.rpartition(".")[2] in self._usual else f"{name}-{callee or '()'}"

    def _function(self, node: _Function, scope: _Scope) -> None:
        """Visit a function. Its decorators and defaults are evaluated outside it."""
        outside = scope._replace(target=node.name)
        self._visit_all((*node.decorator_list, *node.args.defaults, *node.args.kw_defaults), outside)
        positional = (*node.args.posonlyargs, *node.args.args)
        of_class = bool(positional) and scope.self_name == _CLASS_BODY
        self_name = positional[0].arg if of_class else ""
        self._visit_all(node.body, _Scope((*scope.path, node.name), self_name, node.name, _first_line(node)))

    def _class(self, node: ast.ClassDef, scope: _Scope) -> None:
        outside = scope._replace(target=node.name)
        self._visit_all((*node.decorator_list, *node.bases, *(each.value for each in node.keywords)), outside)
        self._visit_all(node.body, _Scope((*scope.path, node.name), _CLASS_BODY, node.name, _first_line(node)))

    def _assign(self, node: ast.Assign, scope: _Scope) -> None:
        self._assigned(node.targets[0], node.value, scope)
        self._visit_all(node.targets, scope)

    def _assign_one(self, node: ast.AnnAssign | ast.AugAssign | ast.NamedExpr, scope: _Scope) -> None:
        if node.value is not None:
            self._assigned(node.target, node.value, scope)
        self.visit(node.target, scope)

    def _assigned(self, target: ast.expr, value: ast.expr, scope: _Scope) -> None:
        match target, value:
            case (ast.Tuple() | ast.List(), ast.Tuple() | ast.List()) if _pairwise(target.elts, value.elts):
                for one, its_value in zip(target.elts, value.elts, strict=True):
                    self._assigned(one, its_value, scope)
            case _:
                self.visit(value, scope._replace(target=_target(target, scope)))

    def _for(self, node: ast.For | ast.AsyncFor, scope: _Scope) -> None:
        self._assigned(node.target, node.iter, scope)
        self._visit_all(node.body, scope._replace(repeats=True))
        self._visit_all(node.orelse, scope)

    def _while(self, node: ast.While, scope: _Scope) -> None:
        self._visit_all((node.test, *node.body), scope._replace(repeats=True))
        self._visit_all(node.orelse, scope)

    def _with_item(self, node: ast.withitem, scope: _Scope) -> None:
        if node.optional_vars is None:
            self.visit(node.context_expr, scope)
        else:
            self._assigned(node.optional_vars, node.context_expr, scope)

    def _dict(self, node: ast.Dict, scope: _Scope) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is not None:
                self.visit(key, scope)
            text = key.value if isinstance(key, ast.Constant) else None
            named = isinstance(text, str) and text.isidentifier()
            self.visit(value, _within(scope, str(text), "") if named else scope)

    def _lambda(self, node: ast.Lambda, scope: _Scope) -> None:
        self.visit(node.args, scope)
        self.visit(node.body, scope._replace(code="<lambda>", line=node.lineno, repeats=False))

    def _comprehension(self, node: _Comprehension, scope: _Scope) -> None:
        first, *others = node.generators
        self.visit(first.iter, scope)
        inner = scope._replace(repeats=True)
        if isinstance(node, ast.GeneratorExp):  # since Python 3.12, no other comprehension has its own code object
            inner = inner._replace(code="<genexpr>", line=node.lineno)
        results = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
        self._visit_all((*results, *first.ifs, *others), inner)


def _first_line(node: _Function | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _pairwise(targets: list[ast.expr], values: list[ast.expr]) -> bool:
    starred = any(isinstance(each, ast.Starred) for each in (*targets, *values))
    return len(targets) == len(values) and not starred


def _target(node: ast.expr, scope: _Scope) -> str:
    """Return the name of the target of an assignment. For an attribute of `self`, it begins with a dot."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner == scope.self_name:
            return f".{name}"
        case ast.Attribute(value=owner, attr=name) | ast.Subscript(value=owner, slice=ast.Constant(value=str(name))):
            before = _target(owner, scope)
            # An index that is no identifier is left out of the name: with such an index, two calls could have the same
            # name. For example, the calls in `caches["users-wrap"] = LRUCache()` and in `caches.users = wrap()` would
            # both have the name "caches.users-wrap".
            return ".".join(filter(None, (before, name))) if name.isidentifier() else before
        case ast.Subscript(value=owner):
            return _target(owner, scope)
        case ast.Tuple(elts=[first, *_]) | ast.List(elts=[first, *_]) | ast.Starred(value=first):
            return _target(first, scope)
    return ""


def _within(scope: _Scope, part: str, otherwise: str) -> _Scope:
    before = scope.target or otherwise
    return scope._replace(target=f"{before}.{part}" if before else part)


def _text(node: ast.expr) -> str:
    """Return the text of a called function, such as ``self.factory``, ``make().cache`` or ``factories['users']``.

    Arguments are left out, and so are indexes that are not constants. Expressions of other kinds have an empty text.
    """
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=owner, attr=name):
            return f"{_text(owner)}.{name}"
        case ast.Call(func=function):
            return f"{_text(function)}()"
        case ast.Subscript(value=owner, slice=ast.Constant(value=str() | int() as key)):
            return f"{_text(owner)}[{key!r}]"
        case ast.Subscript(value=owner):
            return f"{_text(owner)}[]"
    return ""
