"""Finds the place in the program where an unnamed object is made. The place gives the object its name.

The name has two parts. The first is the module. The second is the variable or attribute to which the object is
assigned, or the function that makes the object. The name is the same in every process that runs the program, from any
folder. Edits of other lines do not change the name, unless they add a second constructor call for the same variable,
attribute or function. In a script, the name contains a digest of the file, because another script may have the same
file name. Two places never have the same name. All objects made at one place, for example in a function that is called
often, have the same name.

If the source is missing, for example in a frozen program, the place is a line of a module. In two cases, there is no
place that is the same in other processes: your code belongs to no file (in a notebook, for example), or your program
passes the object's class to other code, such as a framework, which calls it.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
import sys
import tokenize
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

from agentperf_redis.arguments import MAX_NAME_CHARACTERS, nearest_name
from agentperf_redis.call_sites import CallSite, Position, call_sites
from agentperf_redis.program import as_script, is_script, module_name, program_digest, script_file

_THIS_LIBRARY: Final = __name__.partition(".")[0]
_USUAL: Final = frozenset({"LRUCache", "TieredCache"})
"""Constructors that are left out of the names of places. All other functions, such as ``perf.cache``, are part of the
name, since a function with the name `cache` need not return an object of this library."""
_INLINED: Final = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>"})
"""Code that is part of the surrounding function from Python 3.12 on."""
_DEFAULT_OF_FIELD: Final = re.compile(r"__dataclass_dflt_(.+)__|_dflt_(.+)|__attr_factory_(.+)")
"""Matches the variables in generated constructors that hold a default factory: of dataclasses from Python 3.12 on, of
dataclasses before, and of attrs."""
_MAX_FILES: Final = 64
"""Maximum number of files whose calls are kept. The calls of a file with a thousand calls take about 200 KiB."""
_MAX_SOURCE_BYTES: Final = 2**20
"""Larger files are not parsed, since this would take a second. A place in such a file is identified by its line."""
_MAX_KNOWN: Final = 4096
_DIGEST_BYTES: Final = 8

_warned: set[str] = set()
"""Names of places for which a warning was already given."""
_known: dict[tuple[str, CodeType, int], CallSite] = {}
"""The calls that were found, by file, code and offset of the instruction."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place where objects are made.

    Attributes:
        name: the name of the objects made there.
        unknown: why there is no place that is the same in other processes; empty if there is one.
        indirect: whether other code performs the call, so that the user's code cannot pass an argument.
        repeats: whether the place is in a loop, which can make several objects with the same name.
        file: the file of the code.
        line: the line of the code.
    """

    name: str
    unknown: str
    indirect: bool
    repeats: bool
    file: str
    line: int

    def warn(self, call: str, objects: int) -> None:
        """Warn, once for each name, if the name is likely to surprise the user.

        Args:
            call: the call that makes an object, as text.
            objects: the number of live objects with this name in this process.
        """
        if self.unknown:
            remedy = "Give it name='...'"
            if self.indirect:
                remedy = "Call it in your own code, for example lambda size: LRUCache(size, name=...)"
            message = (
                f"{call} has no name, and {self.unknown}. It becomes {self.name!r}, which no other process shares. "
                f"{remedy}"
            )
        elif self.repeats and objects > 1:
            message = f"{call} in a loop makes one cache, {self.name!r}, for all its objects. Give each name='...'"
        else:
            return
        if self.name not in _warned:
            _warned.add(self.name)
            warnings.warn_explicit(message, RuntimeWarning, self.file, self.line)


def place_of(made: object, process: str, method: str = "") -> Place:
    """Return the place where an object is made: the call, in code outside this library, that makes the object.

    Args:
        made: the object. If its class is a user's subclass with a constructor, the place is the call of that
            constructor.
        process: the id of this process. It is part of the name if there is no place that is the same in other
            processes.
        method: the method of `made` that makes the new object; empty if `made` is the new object itself.
    """
    frame = _frame_outside(made, method)
    code, offset, variables = frame.f_code, _offset(frame), _identified(frame.f_globals)
    place = functools.partial(Place, indirect=False, repeats=False, file=code.co_filename, line=frame.f_lineno)
    # One place can make objects of several user-defined classes. In the name, `kind` tells these classes apart.
    kind = "" if method or _of_library(type(made).__module__) else type(made).__name__
    field = _generated_field(frame, kind)
    if field is not None:
        return place(field, "")
    in_file = _has_file(code, variables)
    text = None if in_file else _command_with(code, variables)
    site = _site(frame, offset, text)
    caller = ""
    if not dis.opname[code.co_code[offset]].startswith("CALL"):
        caller = "other code"
    elif site is not None and not method and not _calls_class(frame, site.callee, type(made)):
        caller = f"{site.callee}()"
    unknown = f"is called by {caller}, not by a line of your code that could give it one" if caller else ""
    if text is None and not in_file:
        unknown = "its code is in no file that could give it one"
    if unknown:
        label = f"{hash((code, offset, code.co_filename, kind)) % 2**64:016x}"
        return place(_fitted(f"unnamed-{label}@{process}", ""), unknown, indirect=bool(caller))
    program = program_digest(variables).hex() if text is None else _digest(text)
    module = module_name(variables)
    if site is not None:
        more = f"-{kind}" if kind and site.callee.rpartition(".")[2] != kind else ""
        return place(_fitted(f"{module}.{site.name}{more}", program), "", repeats=site.repeats)
    path = "" if code.co_name == "<module>" else f".{_plain(code.co_qualname)}"
    more = f"-{kind}" if kind else ""
    return place(_fitted(f"{module}{path}:{frame.f_lineno}.{offset}{more}", program), "")


def _offset(frame: FrameType) -> int:
    """Return the offset of a frame's current instruction. `f_lasti` may point into the inline cache that follows it."""
    code, offset = frame.f_code.co_code, frame.f_lasti
    while dis.opname[code[offset]] == "CACHE":
        offset -= 2
    return offset


def _frame_outside(made: object, method: str) -> FrameType:
    """Return the innermost frame that belongs neither to this library nor to the methods that make the object."""
    frame = sys._getframe(1)  # noqa: SLF001  the documented way to the calling code
    while frame.f_back is not None:
        if not _of_library(str(frame.f_globals.get("__name__"))) and not _makes(made, method, frame):
            break
        frame = frame.f_back
    return frame


def _of_library(module: str) -> bool:
    return module == _THIS_LIBRARY or module.startswith(f"{_THIS_LIBRARY}.")


def _makes(made: object, method: str, frame: FrameType) -> bool:
    first, called = _first_argument(frame), frame.f_code.co_name
    if first is made:
        return method in ("", called)
    # The `__call__` of a metaclass may make the object, for example if the class is a singleton.
    return called == "__call__" and isinstance(first, type) and isinstance(made, first)


def _first_argument(frame: FrameType) -> object:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _generated_field(frame: FrameType, kind: str) -> str | None:
    """Return the place's name if a generated constructor, such as a dataclass's, makes a field's default; else None.

    Args:
        frame: the frame of the constructor.
        kind: the name of the object's class if the user defined this class, otherwise empty.
    """
    code, owner = frame.f_code, _first_argument(frame)
    if not code.co_filename.startswith("<") or owner is None:
        return None
    for base in type(owner).__mro__:
        if getattr(vars(base).get(code.co_name), "__code__", None) is code:
            field, module = _called_default(code, frame.f_lasti), sys.modules.get(base.__module__)
            if not field or module is None or not _has_file(None, vars(module)):
                return None
            name = f"{module_name(vars(module))}.{_plain(base.__qualname__)}.{field}{'-' if kind else ''}{kind}"
            return _fitted(name, program_digest(vars(module)).hex())
    return None


def _called_default(code: CodeType, offset: int) -> str:
    """Return the field whose default is made by the call at an offset of a generated constructor; empty if no field."""
    loaded = [
        each.argval for each in dis.get_instructions(code) if each.offset < offset and each.opname.startswith("LOAD_")
    ]
    names = [name for name in loaded if isinstance(name, str)]
    found = _DEFAULT_OF_FIELD.fullmatch(names[-1]) if names else None
    return next(filter(None, found.groups())) if found else ""


def _plain(qualified_name: str) -> str:
    return qualified_name.replace("<locals>.", "").replace("<", "").replace(">", "")


def _identified(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the variables of a module, marked as a script if the module cannot be found by its name.

    Frameworks run files of the user, such as plugins and settings, under names that other files may also have.
    """
    loaded = sys.modules.get(str(variables.get("__name__")))
    if is_script(variables) or getattr(loaded, "__dict__", None) is variables:
        return variables
    return as_script(variables)


def _has_file(code: CodeType | None, variables: Mapping[str, Any]) -> bool:
    """Whether code belongs to a module that other processes can import or run."""
    if code is not None and code.co_filename.startswith("<") and not code.co_filename.startswith("<frozen "):
        return False
    if is_script(variables):
        return script_file(variables) is not None
    return "__name__" in variables


def _command_with(code: CodeType, variables: Mapping[str, Any]) -> str | None:
    """Return the program text passed to ``python -c`` if the code is part of it, otherwise None."""
    if variables.get("__name__") != "__main__" or sys.argv[:1] != ["-c"] or len(sys.orig_argv) <= len(sys.argv):
        return None
    text = sys.orig_argv[-len(sys.argv)]
    return text if code in _codes_of(text) else None


@functools.lru_cache(maxsize=1)
def _codes_of(text: str) -> frozenset[CodeType]:
    """Return the code of a program and of all functions in it, as ``python -c`` compiles them."""
    try:
        left = [compile(text, "<string>", "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return frozenset()
    found = set()
    while left:
        code = left.pop()
        found.add(code)
        left += (each for each in code.co_consts if isinstance(each, CodeType))
    return frozenset(found)


def _fitted(name: str, program: str) -> str:
    """Return a valid name of a place in a program. If the name is changed or cut, it gets a digest of the full name."""
    whole = f"{name}#{program}" if program else name
    valid = nearest_name(whole)
    if valid == whole:
        return whole
    digest = _digest(whole)
    return f"{nearest_name(name)[: MAX_NAME_CHARACTERS - len(digest) - 1]}#{digest}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=_DIGEST_BYTES).hexdigest()


def _calls_class(frame: FrameType, callee: str, made: type) -> bool:
    """Whether a frame calls an object's class directly, rather than a function that may make any number of objects.

    Args:
        frame: the frame that performs the call.
        callee: the called expression, as text.
        made: the class.
    """
    name, *attributes = callee.split(".")
    if callee.rpartition(".")[2] in (base.__name__ for base in made.__mro__):
        return True
    for variables in (frame.f_locals, frame.f_globals, frame.f_builtins):
        if name in variables:
            called = variables[name]
            break
    else:
        return True
    try:
        for attribute in attributes:
            called = inspect.getattr_static(called, attribute)
    except AttributeError:
        return True
    if isinstance(called, functools.partial):
        called = called.func
    return isinstance(called, type) and issubclass(made, called)


def _site(frame: FrameType, offset: int, text: str | None) -> CallSite | None:
    """Return the call that a frame performs; None if the source is unavailable or has changed.

    A call that was found is remembered, so its name stays the same if the source changes while the program runs.

    Args:
        frame: the frame that performs the call.
        offset: offset of the call's instruction.
        text: the source, if it is not in a file.
    """
    code = frame.f_code
    key = (code.co_filename, code, offset)
    known = _known.get(key)
    if known is not None:
        return known
    _, end_line, _, end_column = _position(code, offset)
    if end_line is None or end_column is None:
        return None
    sites = _sites_of(frame) if text is None else _sites_in_source(text)
    site = sites.get((end_line, end_column))
    if site is None or not _performs(code, site):
        return None
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[key] = site
    return site


def _performs(code: CodeType, site: CallSite) -> bool:
    """Whether a call is in the function from which `code` was compiled. False if the source has changed since then."""
    if code.co_name in _INLINED:
        return True
    return code.co_name == site.scope and (code.co_name == "<module>" or code.co_firstlineno == site.scope_line)


def _position(code: CodeType, offset: int) -> tuple[int | None, int | None, int | None, int | None]:
    """Return line, last line, column and last column of the instruction at an offset."""
    return next(islice(code.co_positions(), offset // 2, None), (None, None, None, None))


def _sites_of(frame: FrameType) -> Mapping[Position, CallSite]:
    path, variables = frame.f_code.co_filename, frame.f_globals
    try:
        state = Path(path).stat()
        return _sites_in_file(path, state.st_mtime_ns, state.st_size)
    except OSError:
        pass
    loader, module = variables.get("__loader__"), variables.get("__name__")
    try:
        return _sites_in_source(loader.get_source(module))  # type: ignore[union-attr]  # may be in a zip archive
    except (AttributeError, ImportError, OSError, TypeError, UnicodeError):
        return {}


@functools.lru_cache(maxsize=_MAX_FILES)
def _sites_in_file(path: str, changed_ns: int, size_bytes: int) -> Mapping[Position, CallSite]:  # noqa: ARG001
    """Return the calls in a file. `changed_ns` tells the versions of a file apart."""
    if size_bytes > _MAX_SOURCE_BYTES:
        return {}
    try:
        with tokenize.open(path) as file:
            return _sites_in(file.read())
    except (OSError, SyntaxError, UnicodeError):
        return {}


@functools.lru_cache(maxsize=_MAX_FILES)
def _sites_in_source(source: str) -> Mapping[Position, CallSite]:
    return _sites_in(source)


def _sites_in(source: str) -> Mapping[Position, CallSite]:
    try:
        return call_sites(source, _USUAL)
    except (SyntaxError, ValueError, RecursionError):
        return {}
