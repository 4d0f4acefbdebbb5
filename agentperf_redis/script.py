"""Loads the Lua scripts.

A script is one file under ``lua/`` and runs as one atomic operation. Its header comment is its contract; see
`script_header`.

A line ``--@include NAME`` inserts a fragment: the file ``includes/NAME.lua`` in the folder of the script or, if it is
missing there, in ``lua/``. Includes do not nest. A fragment may be included above the lines that assign KEYS and ARGV
to local variables. Such a fragment cannot use these variables. Therefore its functions take everything that they need
as parameters.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from agentperf_redis.script_header import Header

_INCLUDE = re.compile(r"^--@include (\w+)$", re.MULTILINE)


def read_fragment(directory: Traversable, name: str) -> str:
    """Return the text of a fragment.

    Args:
        directory: the folder of the script that includes the fragment.
        name: the name of the fragment.
    """
    own = directory / "includes" / f"{name}.lua"
    return (own if own.is_file() else lua_folder() / "includes" / f"{name}.lua").read_text(encoding="utf-8")


def lua_folder() -> Traversable:
    """Return the folder of the scripts: inside the installed package, or beside the package in the repository."""
    from importlib import resources  # imported only when a script is read, because the import takes 7 ms

    inside = resources.files("agentperf_redis") / "lua"
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "lua"


class Script:
    """One Lua file, named by its path below ``lua/`` without the suffix: ``Script("balancer/acquire")``.

    The file is read on first use, so that importing the library stays cheap.

    Args:
        name: the name of the script.
        source: the text of the script; None to read its file.
    """

    # The text and its hash are plain attributes, not a `functools.cached_property`. In Python 3.11, a cached property
    # has one lock for all objects. If a process forked while another thread held this lock, the child would wait for
    # the lock forever.

    def __init__(self, name: str, source: str | None = None) -> None:
        self.name = name
        self._source = source
        self._sha: str | None = None

    def __repr__(self) -> str:
        return f"Script({self.name!r})"

    @property
    def source(self) -> str:
        """The text sent to the server, with its fragments inserted."""
        if self._source is None:
            folder, _, base = self.name.partition("/")
            directory = lua_folder() / folder
            text = (directory / f"{base}.lua").read_text(encoding="utf-8")
            self._source = _INCLUDE.sub(lambda found: read_fragment(directory, found[1]), text)
        return self._source

    @property
    def sha(self) -> str:
        """SHA-1 of the source. The server caches the script under it."""
        if self._sha is None:
            self._sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        return self._sha

    @property
    def header(self) -> Header:
        """The header comment at the top of the file, parsed."""
        from agentperf_redis.script_header import parse_header  # most processes never need a header

        return parse_header(self.source)
