"""Sorts, filters and pages rows, in the same way on every screen."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from agentperf_redis import arguments

T = TypeVar("T")
Column = TypeVar("Column", bound=Enum)

MAX_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Order(Generic[Column]):
    """The order of rows.

    Attributes:
        column: the column by which rows are sorted.
        descending: whether the largest value comes first.
    """

    column: Column
    descending: bool


@dataclass(frozen=True, slots=True)
class Selection(Generic[T]):
    """The rows of one page.

    Attributes:
        rows: the rows.
        matching: number of rows that match the filter.
        total: number of all rows.
    """

    rows: tuple[T, ...]
    matching: int
    total: int


def matches(pattern: str, name: str) -> bool:
    """Whether a name matches a filter: a glob such as ``plan*``, or a part of the name. Case is ignored."""
    pattern, name = pattern.casefold(), name.casefold()
    if any(each in pattern for each in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def order_of(
    sort: Column | str, descending: bool | None, columns: type[Column], *, upward: Iterable[Column]
) -> Order[Column]:
    """Check a column and a direction, and return them as an order.

    Args:
        sort: the column, or its value.
        descending: the direction; None for the column's default direction.
        columns: all columns.
        upward: the columns, such as names, that are sorted upwards by default.

    Raises:
        InvalidArgument: if there is no such column, or the direction is not a bool.
    """
    column = arguments.choice("sort", sort, columns)
    if descending is None:
        return Order(column, column not in set(upward))
    return Order(column, arguments.flag("descending", descending))


def selected(
    rows: Iterable[T],
    name: Callable[[T], str],
    values: Mapping[Column, Callable[[T], Any]],
    order: Order[Column],
    match: str = "",
    limit: int = MAX_ROWS,
    offset: int = 0,
) -> Selection[T]:
    """Filter and sort rows, and return one page of them.

    Rows without a value (None) come last in both directions. Rows with equal values are sorted by name.

    Args:
        rows: all rows.
        name: returns the name of a row.
        values: for each column, a function that returns the value of a row.
        order: column and direction.
        match: the filter (see `matches`); empty for all rows.
        limit: maximum number of rows.
        offset: number of rows before the first one.

    Raises:
        InvalidArgument: for an invalid filter, limit or offset.
    """
    pattern = arguments.name("match", match) if match else ""
    arguments.count("limit", limit, minimum=0, maximum=MAX_ROWS)
    arguments.count("offset", offset, minimum=0)
    everything = list(rows)
    found = [row for row in everything if not pattern or matches(pattern, name(row))]
    found.sort(key=name)
    value = values[order.column]
    known = [row for row in found if value(row) is not None]
    known.sort(key=value, reverse=order.descending)  # rows with equal values stay in the order of their names
    ordered = [*known, *(row for row in found if value(row) is None)]
    return Selection(tuple(ordered[offset : offset + limit]), len(found), len(everything))
