"""Loads the Lua scripts and parses their headers.

A script is one file under ``lua/`` and runs as one atomic operation. The header comment is the contract of the script::

    -- acquire: pick an instance and lease one unit of its capacity.
    -- KEYS
    --   state HASH  agentperf:{lb:<type>}:state
    -- ARGV
    --   token       text  '@' followed by the client's request id
    --   ttl_ms      int   TTL of the lease, ms
    -- RETURNS
    --   {1, id}     granted
    -- REPEAT  a second delivery returns the same lease
    -- ERRORS  none
    -- COST    O(log N)

Each line under KEYS has a name, a type and the shape of the key. Each line under ARGV has a name, a type and the unit.
A name that ends in ``...`` stands for any number of values. A line of any other form continues the previous line or is
a remark. Contract tests compare the header with the local variables to which the script assigns KEYS and ARGV in its
first lines, and with the calls from Python.

A line ``--@include NAME`` inserts a fragment: the file ``includes/NAME.lua`` in the folder of the script or, if it is
missing there, in ``lua/``. Includes do not nest. A fragment may be included above the lines that assign KEYS and ARGV
to local variables. Such a fragment cannot use these variables. Therefore its functions take everything that they need
as parameters.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_INCLUDE = re.compile(r"^--@include (\w+)$", re.MULTILINE)
_SLOT = re.compile(r"([a-z]\w*(?:\.\.\.)?) +(STRING|HASH|ZSET|LIST|SET|STREAM|any|int|float|text|bytes)(?: +(.*))?")
_SECTIONS = ("KEYS", "ARGV", "RETURNS", "REPEAT", "ERRORS", "COST")


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


class Slot(NamedTuple):
    """One line of a header: a key or an argument."""

    name: str
    type: str
    shape: str

    @property
    def many(self) -> bool:
        """Whether this line stands for any number of values."""
        return self.name.endswith("...")


class Header(NamedTuple):
    """The parsed header of a script."""

    purpose: str
    keys: tuple[Slot, ...]
    argv: tuple[Slot, ...]
    notes: dict[str, str]
    """RETURNS, REPEAT, ERRORS and COST, as written."""


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
        return parse_header(self.source)


def parse_header(text: str) -> Header:
    """Parse the comment at the top of a script.

    Args:
        text: the text of the file.

    Returns:
        The header; missing sections are empty.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("--") or line.startswith("--@"):
            break
        lines.append(line[2:].rstrip())
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in lines:
        word = line.strip().split(" ", 1)[0]
        if word in _SECTIONS and line.startswith(" " + word):
            current = word
            rest = line.strip()[len(word) :].strip()
            sections[current] = [rest] if rest else []
        else:
            sections[current].append(line.strip())
    return Header(
        purpose=" ".join(sections[""]).strip(),
        keys=_slots(sections.get("KEYS", [])),
        argv=_slots(sections.get("ARGV", [])),
        notes={name: "\n".join(sections[name]) for name in _SECTIONS[2:] if name in sections},
    )


def _slots(lines: list[str]) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    for line in lines:
        found = _SLOT.fullmatch(line)
        if found:
            slots.append(Slot(*found.groups("")))
        elif slots:
            slots[-1] = slots[-1]._replace(shape=f"{slots[-1].shape} {line}".strip())
    return tuple(slots)
