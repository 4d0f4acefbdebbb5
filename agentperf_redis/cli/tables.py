"""Tables that fit the terminal: texts are folded, numbers are never cut."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

_GAP, _NARROW_GAP = 2, 1
"""Spaces between two columns: rich's padding, and a smaller one for tables that would otherwise be too wide."""


class FittedTable(Table):
    """A table whose right-aligned columns hold numbers.

    If the table is wider than the terminal, the gaps become narrower, the titles of the number columns are broken at
    spaces, and texts are folded. If that does not suffice, each row is shown as a list, with one line for each column.
    """

    min_text = 6
    """Minimum width of a text column. In a narrower column, a name that is folded would be hard to read."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._natural_width() <= options.max_width:
            yield from super().__rich_console__(console, options)
        elif self._narrowest() <= options.max_width:
            for column in self.columns:
                if column.justify == "right":
                    column.width = _number_width(column)
            self.padding = (0, _NARROW_GAP, 0, 0)
            yield from super().__rich_console__(console, options)
        else:
            yield from self._as_lists()

    def _natural_width(self) -> int:
        return sum(max(_widths(column)) for column in self.columns) + _GAP * (len(self.columns) - 1)

    def _narrowest(self) -> int:
        numbers = sum(_number_width(column) for column in self.columns if column.justify == "right")
        texts = sum(min(self.min_text, max(_widths(column))) for column in self.columns if column.justify != "right")
        return numbers + texts + _NARROW_GAP * (len(self.columns) - 1)

    def _as_lists(self) -> RenderResult:
        if self.title:
            yield Text(str(self.title), style="bold")
        headers = [str(column.header) for column in self.columns]
        rows = zip(*(column.cells for column in self.columns), strict=True)
        for number, row in enumerate(rows):
            if number:
                yield Text("")
            grid = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
            for header, cell in zip(headers, row, strict=True):
                if str(cell):
                    grid.add_row(header, cell)
            yield grid


def _widths(column: Column) -> list[int]:
    """Return the widths of the title and of the cells."""
    return [cell_len(str(each)) for each in (column.header, *column.cells)]


def _number_width(column: Column) -> int:
    """Return the smallest width at which no number and no word of the title is broken."""
    words = str(column.header).split() or [""]
    return max(cell_len(each) for each in (*words, *map(str, column.cells)))
