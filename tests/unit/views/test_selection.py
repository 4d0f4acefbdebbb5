"""Sorting, filtering and paging of rows."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.errors import InvalidArgument
from agentperf_redis.views.selection import Order, matches, order_of, selected


class Column(Enum):
    NAME = "name"
    SIZE = "size"


Row = tuple[str, float | None]
VALUES: dict[Column, Any] = {Column.NAME: lambda row: row[0], Column.SIZE: lambda row: row[1]}
ROWS: list[Row] = [("b", 2.0), ("a", None), ("C", 1.0), ("d", 2.0)]


def chosen(column: Column, descending: bool, **options: Any) -> list[str]:
    return [row[0] for row in selected(ROWS, lambda row: row[0], VALUES, Order(column, descending), **options).rows]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("plan", "Planner", True),
        ("LAN", "planner", True),
        ("plan*", "planner", True),
        ("plan*", "the planner", False),
        ("job-?", "job-7", True),
        ("[ab]*", "beta", True),
        ("x", "planner", False),
        ("STRASSE", "straße", True),
    ],
)
def test_filter_is_a_part_or_a_glob(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_rows_without_a_value_come_last() -> None:
    assert chosen(Column.SIZE, True) == ["b", "d", "C", "a"]
    assert chosen(Column.SIZE, False) == ["C", "b", "d", "a"]


def test_page_follows_filter_and_order() -> None:
    found = selected(ROWS, lambda row: row[0], VALUES, Order(Column.SIZE, True), "*", limit=2, offset=1)
    assert (found.rows, found.matching, found.total) == ((("d", 2.0), ("C", 1.0)), 4, 4)
    found = selected(ROWS, lambda row: row[0], VALUES, Order(Column.SIZE, True), "c")
    assert (found.rows, found.matching, found.total) == ((("C", 1.0),), 1, 4)


@given(st.lists(st.tuples(st.text(max_size=3), st.none() | st.integers(0, 3))), st.booleans())
def test_order_is_total(rows: list[tuple[str, int | None]], descending: bool) -> None:
    found = selected(rows, lambda row: row[0], VALUES, Order(Column.SIZE, descending)).rows
    again = selected(rows[::-1], lambda row: row[0], VALUES, Order(Column.SIZE, descending)).rows
    assert found == again
    assert sorted(found, key=repr) == sorted(rows, key=repr)


def test_names_are_sorted_upwards_and_numbers_downwards() -> None:
    assert order_of("name", None, Column, upward=(Column.NAME,)) == Order(Column.NAME, descending=False)
    assert order_of(Column.SIZE, None, Column, upward=(Column.NAME,)) == Order(Column.SIZE, descending=True)
    assert order_of("size", False, Column, upward=(Column.NAME,)) == Order(Column.SIZE, descending=False)


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"match": "a\nb"}, "match"), ({"match": 7}, "match"), ({"limit": -1}, "limit"), ({"offset": 0.5}, "offset")],
)
def test_wrong_arguments_are_named(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        chosen(Column.SIZE, True, **options)
    assert refused.value.argument == argument


@pytest.mark.parametrize(("sort", "descending", "argument"), [("x", None, "sort"), ("name", 1, "descending")])
def test_wrong_order_is_named(sort: Any, descending: Any, argument: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        order_of(sort, descending, Column, upward=())
    assert refused.value.argument == argument
