"""Reads the stored time slices of a metrics series in both of their forms: open slices, and closed slices in lists."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from agentperf_redis import keys
from agentperf_redis.keys import decoded
from agentperf_redis.metrics.counters import MAXIMA, MINIMA

WIDTHS = ("10s", "1m", "1h", "1d")
Slices = dict[tuple[str, str], dict[str, int]]
"""The counters of each slice, by its width and its start, such as ("1m", "2026-11-22T16:45")."""


def stored_slices(raw: Any, namespace: str, series: str) -> Slices:
    """Return all slices of a series; the two forms of a slice are added up. `series` is percent-encoded."""
    tag = keys.metrics_tag(namespace, keys.metrics_shard(series.partition("/")[0]))
    found: Slices = {}
    for width in WIDTHS:
        for start, fields in open_slices(raw, tag, width, series).items():
            add(found.setdefault((width, start), {}), fields)
        for line in raw.lrange(f"{tag}:slices:{width}:{series}", 0, -1):
            add(found.setdefault((width, line.partition(" ")[0]), {}), fields_of(line))
    return found


def open_slices(raw: Any, tag: str, width: str, series: str) -> dict[str, dict[str, int]]:
    """Return the slices of one width that are hashes, by their start."""
    prefix, suffix = f"{tag}:{width}:", f":{series}"
    return {
        key.removeprefix(prefix).removesuffix(suffix): {name: int(text) for name, text in raw.hgetall(key).items()}
        for key in raw.keys(f"{prefix}*{suffix}")
    }


def fields_of(line: str) -> dict[str, int]:
    """Return the counters in the line of a closed slice, under the names that they have in an open one."""
    head, _, runs = line.partition(" | ")
    pairs = (word.split("=") for word in head.split(" ")[1:])
    fields = {decoded(name): int(text) for name, text in pairs}
    for run in runs.split():
        first, _, counts = run.partition(":")
        fields |= {f"h:{index}": int(text) for index, text in zip(count(int(first)), counts.split(",")) if text != "0"}
    return fields


def add(fields: dict[str, int], more: Mapping[str, int]) -> None:
    """Add the counters `more` to `fields`. Of two minima, the smaller one is kept; of two maxima, the larger one."""
    for name, value in more.items():
        known = fields.get(name)
        if known is None:
            fields[name] = value
        else:
            fields[name] = (
                min(known, value) if name in MINIMA else max(known, value) if name in MAXIMA else known + value
            )
