"""The identity of a program's code: the name of a module, and for a script also a digest of its file.

Every process names its script ``__main__``, which identifies nothing. The name of the script's file and a digest of its
contents together identify the program. So two scripts with the same name but different contents are two programs, and
one script is the same program in any folder and on any machine.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_MAIN: Final = "__main__"
_SCRIPTS: Final = (_MAIN, "__mp_main__", "<run_path>")
"""Values of ``__name__`` in a script: in its own process, in a process of multiprocessing, and under `runpy`."""
_DIGEST_BYTES: Final = 8
"""64 bits are enough, since few programs have the same name."""


def module_of(thing: Any) -> str:
    """Return the name of the module of a function or class; see `module_name`."""
    return module_name(_globals_of(thing))


def program_of(thing: Any) -> bytes:
    """Return the digest of the script that defines a function or class; see `program_digest`."""
    return program_digest(_globals_of(thing))


def module_name(variables: Mapping[str, Any]) -> str:
    """Return the name of a module; for a script, the name of its file or package.

    Args:
        variables: the global variables of the module.

    Returns:
        The name; ``__main__`` for a script without a file, such as a notebook.
    """
    module = str(variables.get("__name__"))
    if module not in _SCRIPTS:
        return module
    spec = variables.get("__spec__")
    if spec is not None and spec.name != _MAIN:  # python -m
        return str(spec.name)
    path = script_file(variables)
    if path is None:
        return _MAIN
    # `python FOLDER` and `python ARCHIVE.zip` run the file __main__.py in the folder or archive
    return Path(path).parent.stem if Path(path).stem == _MAIN else Path(path).stem


def program_digest(variables: Mapping[str, Any]) -> bytes:
    """Return a digest of the file of a script; empty for an imported module and for a script without a file.

    Args:
        variables: the global variables of the module.
    """
    spec = variables.get("__spec__")
    if variables.get("__name__") not in _SCRIPTS or (spec is not None and spec.name != _MAIN):
        return b""
    path = script_file(variables)
    if path is None:
        return b""
    try:
        return _digest_of_file(path)
    except OSError:
        try:
            return _digest(variables["__loader__"].get_data(path))  # a file in a zip archive
        except (KeyError, AttributeError, OSError):  # without contents, only the file's name identifies the script
            return b""


def is_script(variables: Mapping[str, Any]) -> bool:
    """Whether a module is the script of its process."""
    return variables.get("__name__") in _SCRIPTS


def as_script(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a copy of a module's variables that makes the module count as a script.

    This is for a module whose name may also be the name of other files.
    """
    return {**variables, "__name__": _MAIN, "__spec__": None}


def script_file(variables: Mapping[str, Any]) -> str | None:
    """Return the path of a script. Return None if it was typed or piped in; Python calls such a script ``<stdin>``."""
    path = variables.get("__file__")
    return None if path is None or str(path).startswith("<") else str(path)


def _globals_of(thing: Any) -> Mapping[str, Any]:
    # A method of a built-in class, such as str.upper, has no `__module__`. Its class has one.
    module = str(thing.__module__ if hasattr(thing, "__module__") else thing.__objclass__.__module__)
    loaded = sys.modules.get(module) if module in _SCRIPTS else None
    return {"__name__": module} if loaded is None else vars(loaded)


@functools.cache
def _digest_of_file(path: str) -> bytes:
    return _digest(Path(path).read_bytes())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
