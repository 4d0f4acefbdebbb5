"""The query of a page's address: window, order, filter, page number. So a user can share any view by its address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from agentperf_redis.errors import InvalidArgument
from agentperf_redis.views.timeline import DEFAULT_WINDOW
from agentperf_redis.windows import window_seconds

PAGE_ROWS = 100
"""Rows of a table on one page. With their sparklines, this many rows fit into a page of 200 kB."""
_MAX_PAGE = 1_000
_MAX_MATCH = 200


@dataclass(frozen=True, slots=True)
class Asked:
    """The query of an address, checked.

    Attributes:
        query: all parameters as they came.
        window: length of the window.
        sort: the column by which rows are sorted; None for the usual one.
        descending: whether rows are in descending order; None for the usual direction.
        match: the filter; empty for all rows.
        page: number of the page of a table, from 0.
    """

    query: Mapping[str, str]
    window: str
    sort: str | None
    descending: bool | None
    match: str
    page: int

    @property
    def rows(self) -> dict[str, Any]:
        """The arguments for the read of a view that has rows."""
        chosen: dict[str, Any] = {"match": self.match, "limit": PAGE_ROWS, "offset": self.page * PAGE_ROWS}
        if self.sort is not None:
            chosen["sort"] = self.sort
        if self.descending is not None:
            chosen["descending"] = self.descending
        return chosen

    def text(self, name: str) -> str:
        """Return a parameter that a page cannot do without.

        Raises:
            InvalidArgument: the address lacks it.
        """
        value = self.query.get(name, "")
        if not value:
            raise InvalidArgument(name, value, "a name: follow a link of this dashboard")
        return value


def asked(query: Mapping[str, str]) -> Asked:
    """Check the query of an address.

    Raises:
        InvalidArgument: for an invalid value.
    """
    window = query.get("window", DEFAULT_WINDOW)
    try:
        window_seconds(window)
    except InvalidArgument:  # the text of this error is for programmers
        raise InvalidArgument("window", window, "30s, 5m, 1h, 3d and so on, up to ten years") from None
    order = query.get("order")
    if order not in (None, "asc", "desc"):
        raise InvalidArgument("order", order, "'asc' or 'desc'")
    match = query.get("match", "").strip()
    if len(match) > _MAX_MATCH:
        raise InvalidArgument("match", f"{match[:20]}…", f"at most {_MAX_MATCH} characters")
    page = query.get("page", "0")
    if not (page.isascii() and page.isdigit() and len(page) <= len(str(_MAX_PAGE)) and int(page) <= _MAX_PAGE):
        raise InvalidArgument("page", page, f"a whole number from 0 to {_MAX_PAGE}")
    return Asked(query, window, query.get("sort"), None if order is None else order == "desc", match, int(page))


def address(path: str, query: Mapping[str, object]) -> str:
    """Return a path with a query. Names may hold any character, so they are in the query, not in the path.

    In a path, browsers resolve ``..`` and servers merge ``//``, even if the characters are encoded.
    """
    chosen = {name: str(value) for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(chosen)}" if chosen else path
