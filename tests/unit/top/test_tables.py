"""The columns that a table shows fit the terminal."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.top.tables import Column, _fitting


def column(title: str, rank: int, is_text: bool = False) -> Column[Any]:
    return Column(title, str, None, rank, is_text)


NAME, NUMBER, RARE, TEXT = (
    column("name", 0, is_text=True),
    column("number", 0),
    column("rare", 5),
    column("text", 1, is_text=True),
)
COLUMNS = (NAME, NUMBER, RARE, TEXT)


def test_important_columns_are_kept() -> None:
    assert _fitting(COLUMNS, (30, 6, 6, 20), 200) == {0: 30, 1: 6, 2: 6, 3: 20}
    assert _fitting(COLUMNS, (30, 6, 6, 20), 30) == {0: 20, 1: 6}
    assert _fitting(COLUMNS, (30, 6, 6, 20), 10) == {0: 16, 1: 6}


def test_texts_are_cut_before_they_are_left_out() -> None:
    assert _fitting(COLUMNS, (16, 6, 6, 50), 50) == {0: 16, 1: 6, 3: 22}


@given(st.lists(st.integers(1, 80), min_size=4, max_size=4), st.integers(10, 200))
def test_columns_fit_unless_the_needed_ones_do_not(widths: list[int], room: int) -> None:
    chosen = _fitting(COLUMNS, widths, room)
    assert {0, 1} <= set(chosen)
    assert list(chosen) == sorted(chosen)
    used = sum(width + 2 for width in chosen.values())
    needed = min(widths[0], 16) + widths[1] + 4
    assert used <= max(room, needed)
