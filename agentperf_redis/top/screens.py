"""The screens: the listings in tabs, and one agent, cache or pool."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Label, Sparkline, Static, TabbedContent, TabPane

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.alerts.targets import cache_of_target
from agentperf_redis.command import Flow
from agentperf_redis.top.details import AgentDetail, CacheDetail, Chart, Detail, PoolDetail
from agentperf_redis.top.listings import AGENTS, CACHES, LISTINGS, POOLS, Asked, Listing
from agentperf_redis.top.tables import FittedTable
from agentperf_redis.views.text import printable
from agentperf_redis.windows import Timestamp


class ReadNow(Message):
    """A screen needs other numbers than those that it shows."""


class Viewed(Screen[None]):
    """A screen that shows a view, which the app reads again and again.

    Each kind of screen defines `reading`, `asked` and `show`. The metaclass of textual's screens rules out `abc.ABC`.
    """

    is_ready = False
    """Whether the widgets have been created."""

    def compose(self) -> ComposeResult:
        """Make the widgets."""
        yield Static(id="headline")
        yield Static(id="state")
        yield from self.content()
        yield Footer(compact=True)

    def content(self) -> ComposeResult:
        """Make the widgets between headline and footer."""
        yield from ()

    def reading(self, perf: AgentPerf, window: str, as_of: Timestamp) -> Flow[Any]:
        """Return the flow that reads the view of this screen."""
        raise NotImplementedError

    def asked(self) -> object:
        """Return what the screen shows. A view that was read for another request is dropped."""
        raise NotImplementedError

    def show(self, view: Any) -> None:
        """Show a view."""
        raise NotImplementedError

    def on_mount(self) -> None:
        """Read as soon as the widgets are there."""
        self.is_ready = True
        self.post_message(ReadNow())

    def on_screen_resume(self) -> None:
        """Read when the screen comes to the top again."""
        self.post_message(ReadNow())

    def headline(self, text: Text, state: Text) -> None:
        """Show the top line and, below it, the state of reading if that state is unusual."""
        self.query_one("#headline", Static).update(text)
        line = self.query_one("#state", Static)
        line.update(state)
        line.display = bool(state.plain)


class ListingTable(FittedTable[Any]):
    """A table whose rows can be opened."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Open")]


class FilterField(Input):
    """The filter of a tab."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Keep the filter"),
        Binding("escape", "screen.clear_filter", "Show all rows"),
    ]


class ListingScreen(Viewed):
    """Agents, caches, pools and alerts in tabs."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", "Sort by the column before", show=False),
        Binding("r", "reverse", "Reverse"),
        # With priority, the filter opens before the next key is processed, so fast typing loses no key.
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("escape", "clear_filter", "Clear the filter", show=False),
        *(
            Binding(str(number), f"tab('{listing.name}')", listing.name.capitalize(), show=False)
            for number, listing in enumerate(LISTINGS, 1)
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._asked = {listing.name: Asked("", listing.sort) for listing in LISTINGS}

    def content(self) -> ComposeResult:
        """See `Viewed.content`."""
        with TabbedContent(id="tabs"):
            for number, listing in enumerate(LISTINGS, 1):
                with TabPane(f"{number} {listing.name.capitalize()}", id=listing.name):
                    yield Label(id=f"{listing.name}-summary", classes="summary", markup=False)
                    yield Static(id=f"{listing.name}-empty", classes="empty", markup=False)
                    yield ListingTable(listing.columns, listing.key, id=f"{listing.name}-table")
        yield FilterField(placeholder="part of a name, or a glob such as plan*", id="filter", compact=True)

    def on_mount(self) -> None:
        """Hide the filter, and give the keyboard to the table."""
        self.query_one("#filter", Input).display = False
        self.set_focus(self._table())

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002  as in textual
        """While the filter is open, let a slash reach it as text, because names may contain slashes."""
        return action != "filter" or not isinstance(self.focused, Input)

    @property
    def listing(self) -> Listing:
        """The active tab."""
        active = self.query_one("#tabs", TabbedContent).active
        return next((listing for listing in LISTINGS if listing.name == active), AGENTS)

    def reading(self, perf: AgentPerf, window: str, as_of: Timestamp) -> Flow[Any]:
        """See `Viewed.reading`."""
        asked = self._asked[self.listing.name]
        return self.listing.read(perf, Asked(window, asked.sort, asked.descending, asked.match, as_of))

    def asked(self) -> object:
        """See `Viewed.asked`."""
        return self.listing.name, self._asked[self.listing.name]

    def show(self, view: Any) -> None:
        """See `Viewed.show`."""
        listing = self.listing
        shown = listing.shown(view)
        words = [shown.summary]
        match = self._asked[listing.name].match
        if match:
            words.append(f"{shown.matching} match {match!r}")
        if len(shown.rows) < shown.matching:
            words.append(f"the first {len(shown.rows)} of {shown.matching} are shown")
        self.query_one(f"#{listing.name}-summary", Label).update(printable(" · ".join(words)))
        empty = self.query_one(f"#{listing.name}-empty", Static)
        table = self._table()
        empty.update(listing.empty if not shown.known else "No name matches the filter. Escape clears it.")
        empty.display = not shown.rows
        table.display = bool(shown.rows)
        table.show_rows(shown.rows, shown.order)

    def action_sort(self, by: int) -> None:
        """Sort by the next sortable column, or by the previous one."""
        columns = [column.sort for column in self.listing.columns if column.sort is not None]
        at = columns.index(self._asked[self.listing.name].sort)
        self._ask(sort=columns[(at + by) % len(columns)], descending=None)

    def action_reverse(self) -> None:
        """Turn the order round."""
        order = self._table().order
        if order is not None:
            self._ask(sort=order.column, descending=not order.descending)

    def action_filter(self) -> None:
        """Open the filter."""
        field = self.query_one("#filter", Input)
        field.display = True
        field.value = self._asked[self.listing.name].match
        self.set_focus(field)

    def action_clear_filter(self) -> None:
        """Close the filter, and show all rows again."""
        self.query_one("#filter", Input).display = False
        self.set_focus(self._table())
        if self._asked[self.listing.name].match:
            self._ask(match="")

    def action_tab(self, name: str) -> None:
        """Change to a tab."""
        self.query_one("#tabs", TabbedContent).active = name

    def _detail_of(self, row: Any) -> Detail[Any] | None:
        if self.listing is AGENTS:
            return AgentDetail(row.name)
        if self.listing is CACHES:
            return CacheDetail(row.name, row.kind)
        if self.listing is POOLS:
            return PoolDetail(row.name)
        if row.scope == "cache":
            return CacheDetail(*cache_of_target(row.target))
        return PoolDetail(row.target) if row.scope == "pool" else AgentDetail(row.target)

    @on(DataTable.RowSelected)
    def _open(self, event: DataTable.RowSelected) -> None:
        row = self._table().row_at(event.cursor_row)
        detail = None if row is None else self._detail_of(row)
        if detail is not None:
            self.app.push_screen(DetailScreen(detail))

    @on(DataTable.HeaderSelected)
    def _sort_by_title(self, event: DataTable.HeaderSelected) -> None:
        column = self._table().column_of(event.column_key.value)
        if column is None or column.sort is None:
            return
        if column.sort is self._asked[self.listing.name].sort:
            self.action_reverse()
        else:
            self._ask(sort=column.sort, descending=None)

    @on(Input.Changed, "#filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        if event.input.has_focus and event.value != self._asked[self.listing.name].match:
            self._ask(match=event.value)

    @on(Input.Submitted, "#filter")
    def _filter_done(self, event: Input.Submitted) -> None:
        event.input.display = False
        self.set_focus(self._table())
        if event.value != self._asked[self.listing.name].match:
            self._ask(match=event.value)

    @on(TabbedContent.TabActivated)
    def _tab_changed(self) -> None:
        self.query_one("#filter", Input).display = False
        self.set_focus(self._table())
        self.post_message(ReadNow())

    def _ask(self, **changes: Any) -> None:
        name = self.listing.name
        old = self._asked[name]
        new = {"sort": old.sort, "descending": old.descending, "match": old.match} | changes
        self._asked[name] = Asked("", **new)
        self.post_message(ReadNow())

    def _table(self) -> ListingTable:
        return self.query_one(f"#{self.listing.name}-table", ListingTable)


class ChartBox(Vertical):
    """A titled chart."""

    def compose(self) -> ComposeResult:
        """Make the widgets."""
        yield Label(classes="chart-title", markup=False)
        yield Sparkline([], summary_function=max)

    def show(self, chart: Chart) -> None:
        """Show a chart. Its title names the last and the largest value."""
        known = [value for value in chart.values if value is not None]
        text = f"{chart.title}: no data"
        if known:
            text = f"{chart.title}: last {chart.shown(known[-1])}, at most {chart.shown(max(known))}"
        self.query_one(Label).update(text)
        self.query_one(Sparkline).data = [value or 0.0 for value in chart.values]


class DetailScreen(Viewed):
    """One agent, cache or pool.

    Args:
        detail: what the screen reads and shows.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,backspace", "app.pop_screen", "Back", key_display="esc"),
        Binding("tab", "tab(1)", "Next tab", show=True, priority=True),
        Binding("shift+tab", "tab(-1)", "Tab before", show=False, priority=True),
    ]

    def __init__(self, detail: Detail[Any]) -> None:
        super().__init__()
        self._detail = detail

    def content(self) -> ComposeResult:
        """See `Viewed.content`."""
        yield Label(f"{self._detail.kind} {printable(self._detail.name)}", id="title", markup=False)
        yield Label(id="summary", classes="summary", markup=False)
        with Horizontal(id="charts"):
            yield ChartBox(id="chart-0")
            yield ChartBox(id="chart-1")
        with TabbedContent(id="parts"):
            for number, part in enumerate(self._detail.parts):
                with TabPane(part.name, id=f"part-{number}"):
                    yield FittedTable(part.columns, part.key, id=f"table-{number}")

    def reading(self, perf: AgentPerf, window: str, as_of: Timestamp) -> Flow[Any]:
        """See `Viewed.reading`."""
        return self._detail.read(perf, window, as_of)

    def asked(self) -> object:
        """See `Viewed.asked`."""
        return self._detail

    def show(self, view: Any) -> None:
        """See `Viewed.show`."""
        summary = self.query_one("#summary", Label)
        if view is None:
            summary.update("It is gone, or has never been there.")
            return
        summary.update(printable_lines(self._detail.summary(view)))
        for number, chart in enumerate(self._detail.charts(view)):
            self.query_one(f"#chart-{number}", ChartBox).show(chart)
        for number, part in enumerate(self._detail.parts):
            rows = part.rows(view)
            self.query_one(f"#table-{number}", FittedTable).show_rows(rows)
            count = f" ({len(rows)})" if part.name != "Over time" else ""
            self.query_one("#parts", TabbedContent).get_tab(f"part-{number}").label = part.name + count

    def action_tab(self, by: int) -> None:
        """Change to the next tab, or to the one before."""
        parts = self.query_one("#parts", TabbedContent)
        at = int(parts.active.removeprefix("part-") or 0)
        parts.active = f"part-{(at + by) % len(self._detail.parts)}"

    @on(TabbedContent.TabActivated)
    def _tab_changed(self) -> None:
        active = self.query_one("#parts", TabbedContent).active.removeprefix("part-")
        self.query_one(f"#table-{active}", FittedTable).focus()


def printable_lines(lines: list[str]) -> str:
    """Return lines as text without control characters."""
    return "\n".join(map(printable, lines))
