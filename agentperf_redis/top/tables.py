"""A table that shows as many columns as the terminal has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Literal, TypeVar

from rich.cells import cell_len
from rich.text import Text
from textual.events import Resize
from textual.widgets import DataTable

from agentperf_redis.views.selection import Order
from agentperf_redis.views.text import printable

T = TypeVar("T")

_MAX_TEXT, _MIN_TEXT = 60, 16
"""Maximum width of a text column, and its minimum width where there is little room."""
_GAP = 2
"""Cells between two columns."""
_SCROLLBAR = 2


@dataclass(frozen=True)  # without slots, because `Column[X](...)` fails with slots
class Column(Generic[T]):
    """A column.

    Attributes:
        title: its title.
        cell: returns the text of a row's cell.
        sort: the member of the view's enum by which a click on the title sorts; None if a click does not sort.
        rank: if there is too little room, columns of higher rank are left out first; a column of rank 0 is always
            shown.
        is_text: whether the column holds texts, which are aligned to the left, and not numbers.
        style: returns the style of a row's cell. The style repeats in colour what the text says.
    """

    title: str
    cell: Callable[[T], str]
    sort: Enum | None = None
    rank: int = 1
    is_text: bool = False
    style: Callable[[T], str] | None = None


class FittedTable(DataTable[Text], Generic[T]):
    """A table of rows of a view. The first column names the row.

    Args:
        columns: the columns.
        key: returns a text that identifies a row, so that the cursor stays on it.
        id: id of the widget.
    """

    def __init__(self, columns: Sequence[Column[T]], key: Callable[[T], str], id: str) -> None:  # noqa: A002  as in textual
        super().__init__(cursor_type="row", zebra_stripes=True, id=id)
        self._all = tuple(columns)
        self._key = key
        self._rows: Sequence[T] = ()
        self._keys: list[str] = []
        self._order: Order[Any] | None = None
        self._shown: tuple[Column[T], ...] = ()

    def show_rows(self, rows: Sequence[T], order: Order[Any] | None = None) -> None:
        """Replace all rows. The cursor stays on its row if that row still exists."""
        self._rows, self._order = rows, order
        cells = [[_text(column, row) for row in rows] for column in self._all]
        titles = [self._title(column) for column in self._all]
        widths = [
            max(cell_len(title), 1, *(text.cell_len for text in of)) for title, of in zip(titles, cells, strict=True)
        ]
        chosen = _fitting(self._all, widths, max(self.size.width, 20) - _SCROLLBAR)
        scroll = self.scroll_offset
        at = self.cursor_row
        current = self._keys[at] if 0 <= at < len(self._keys) else None
        with self.app.batch_update():
            self.clear(columns=True)
            for number, width in chosen.items():
                justify = _justify(self._all[number])
                self.add_column(Text(titles[number], justify=justify), key=str(number), width=width)
            for number_of_row in range(len(rows)):
                texts = [cells[number][number_of_row] for number in chosen]
                for text, width in zip(texts, chosen.values(), strict=True):
                    text.truncate(width, overflow="ellipsis")
                self.add_row(*texts)
            self._shown = tuple(self._all[number] for number in chosen)
            self._keys = [self._key(row) for row in rows]
            if rows:
                at = self._keys.index(current) if current in self._keys else min(at, len(rows) - 1)
                self.move_cursor(row=at, animate=False, scroll=False)
                self.scroll_to(x=scroll.x, y=scroll.y, animate=False)

    def row_at(self, number: int) -> T | None:
        """Return a row by its number, counted from 0; None if there is no such row."""
        return self._rows[number] if 0 <= number < len(self._rows) else None

    def column_of(self, column_key: str | None) -> Column[T] | None:
        """Return the column that has this key in the table."""
        return None if column_key is None else self._all[int(column_key)]

    @property
    def order(self) -> Order[Any] | None:
        """The order of the rows; None if the rows have none."""
        return self._order

    @property
    def titles(self) -> list[str]:
        """The titles of the shown columns."""
        return [column.title for column in self._shown]

    def on_resize(self, _: Resize) -> None:
        """Choose the columns again."""
        self.call_after_refresh(lambda: self.show_rows(self._rows, self._order))

    def _title(self, column: Column[T]) -> str:
        if self._order is None or column.sort is not self._order.column:
            return column.title
        return f"{column.title} {'▼' if self._order.descending else '▲'}"


def _justify(column: Column[Any]) -> Literal["left", "right"]:
    return "left" if column.is_text else "right"


def _text(column: Column[T], row: T) -> Text:
    style = "" if column.style is None else column.style(row)
    return Text(printable(column.cell(row)), style=style, justify=_justify(column), no_wrap=True)


def _fitting(columns: Sequence[Column[Any]], widths: Sequence[int], room: int) -> dict[int, int]:
    """Return the numbers and the widths of the columns that fit, from left to right."""
    wanted = [min(width, _MAX_TEXT) if column.is_text else width for column, width in zip(columns, widths, strict=True)]
    name = min(wanted[0], _MIN_TEXT)
    chosen = {number: wanted[number] for number, column in enumerate(columns) if column.rank == 0}
    chosen[0] = name
    left = room - sum(width + _GAP for width in chosen.values())
    for number in sorted(range(len(columns)), key=lambda number: (columns[number].rank, number)):
        column = columns[number]
        if number in chosen or left < _GAP:
            continue
        width = min(wanted[number], left - _GAP) if column.is_text else wanted[number]
        if width >= min(wanted[number], _MIN_TEXT) and width + _GAP <= left:
            chosen[number] = width
            left -= width + _GAP
    chosen[0] = min(wanted[0], name + max(0, left))
    return dict(sorted(chosen.items()))
