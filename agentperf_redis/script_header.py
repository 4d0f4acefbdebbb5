"""Parses the header comments of the Lua scripts.

The header comment is the contract of a script::

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
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SLOT = re.compile(r"([a-z]\w*(?:\.\.\.)?) +(STRING|HASH|ZSET|LIST|SET|STREAM|any|int|float|text|bytes)(?: +(.*))?")
_SECTIONS = ("KEYS", "ARGV", "RETURNS", "REPEAT", "ERRORS", "COST")


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
