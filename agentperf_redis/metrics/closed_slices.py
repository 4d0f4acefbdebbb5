"""Reads the lines of closed time slices. `lua/metrics/includes/closed.lua` describes the lines."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import lru_cache
from urllib.parse import unquote_to_bytes

_MINIMA = frozenset({b"min_us", b"first_ms"})
_EXTREMES = _MINIMA | {b"max_us", b"last_ms"}
_MAX_DIGITS = 15
_MAX_EXTREME = 9_000_000_000_000_000
_MAX_SUM, _LARGEST = 10**24, 2**63 - 1024
"""A stored sum of `_MAX_SUM` or more is damaged. A sum beyond 64 bits is read as `_LARGEST`, as in scripts."""


def add_closed(line: bytes, fields: MutableMapping[bytes, int], buckets: MutableMapping[int, int]) -> None:
    """Add the counters of a closed slice to `fields` and `buckets`.

    Args:
        line: the slice, such as ``2026-11-22T16 n=4 ok=4 sum_us=812 min_us=90 max_us=412 | -49:1 -44:2,0,1``.
        fields: counters, by the names that they have in an open slice.
        buckets: counts of the histogram's buckets, by index.

    Raises:
        ValueError: `line` is not the line of a closed slice.
    """
    head, _, runs = line.partition(b" | ")
    for word in head.split(b" ")[1:]:
        name, _, text = word.partition(b"=")
        if b"%" in name:
            name = unquote_to_bytes(name)
        value = int(text) if text.isdigit() and len(text) <= _MAX_DIGITS else _large(text)
        known = fields.get(name)
        if name in _EXTREMES:
            if value >= _MAX_EXTREME:
                raise ValueError(text)
            if known is not None and known >= 0:
                value = min(known, value) if name in _MINIMA else max(known, value)
            fields[name] = value
        else:
            fields[name] = value if known is None else min(known + value, _LARGEST)
    if runs:
        for run in runs.split(b" "):
            first, _, counts = run.partition(b":")
            for index, text in enumerate(counts.split(b","), _bucket(first)):
                if text != b"0":
                    count = int(text)
                    if not 0 < count < _MAX_EXTREME:
                        raise ValueError(text)
                    buckets[index] = buckets.get(index, 0) + count


@lru_cache(maxsize=1024)
def _bucket(text: bytes) -> int:
    return int(text)


def _large(text: bytes) -> int:
    """Read a number that has more than 15 digits, or is stored in the form 1.5e+17."""
    number = float(text)
    if not 0 <= number < _MAX_SUM:
        raise ValueError(text)
    return min(int(number), _LARGEST)
