"""Tests of tables in narrow terminals: texts are folded, numbers stay whole."""

from __future__ import annotations

import io

from rich.console import Console

from agentperf_redis.cli.console import new_table
from agentperf_redis.cli.tables import FittedTable


def table() -> FittedTable:
    made = new_table("caches", ["cache"], ["entries", "hit rate", "seconds saved"], ["note"])
    made.add_row("a.rather.long.name", "1234567", "100.0%", "123456.789", "")
    made.add_row("b", "1", "0.0%", "0.0", "some words")
    return made


def lines_of(made: FittedTable, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(made)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_wide_table_has_one_line_per_row() -> None:
    title, header, first, second = lines_of(table(), 100)
    assert title == "caches"
    assert header.split() == ["cache", "entries", "hit", "rate", "seconds", "saved", "note"]
    assert first.split() == ["a.rather.long.name", "1234567", "100.0%", "123456.789"]
    assert second.split() == ["b", "1", "0.0%", "0.0", "some", "words"]


def test_numbers_are_whole_at_every_width() -> None:
    for width in range(4, 100):
        lines = lines_of(table(), width)
        assert max(map(len, lines)) <= width
        if width >= 26:  # wide enough for a list with the widest title and the widest number
            tokens = " ".join(lines).split()
            assert {"1234567", "100.0%", "123456.789", "0.0%"} <= set(tokens), lines
        if width >= 39:  # wide enough for the narrowest table
            assert "1234567 100.0% 123456.789" in " ".join(" ".join(lines).split())


def test_too_narrow_table_becomes_lists() -> None:
    lines = lines_of(table(), 38)
    assert lines[:3] == ["caches", "cache          a.rather.long.name", "entries        1234567"]
    assert lines[5:7] == ["", "cache          b"]
    assert lines[-1] == "note           some words"


def test_rows_keep_their_style() -> None:
    made = new_table("", ["name"], ["n"])
    made.add_row("a", "1", style="red")
    console = Console(width=40, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(made)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[31m" in console.file.getvalue()
