from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from agentperf_redis.errors import InvalidArgument
from agentperf_redis.web.pages.asked import PAGE_ROWS, address, asked


def test_empty_query_asks_for_the_usual_view() -> None:
    found = asked({})
    assert (found.window, found.sort, found.descending, found.match, found.page) == ("10m", None, None, "", 0)
    assert found.rows == {"match": "", "limit": PAGE_ROWS, "offset": 0}


def test_query_chooses_the_rows() -> None:
    found = asked({"window": "1h", "sort": "p95", "order": "asc", "match": " plan* ", "page": "2"})
    expected = {"sort": "p95", "descending": False, "match": "plan*", "limit": PAGE_ROWS, "offset": 2 * PAGE_ROWS}
    assert (found.window, found.rows) == ("1h", expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", "yesterday"),
        ("window", "0s"),
        ("order", "up"),
        ("match", "x" * 201),
        ("page", "-1"),
        ("page", "²"),
        ("page", "1001"),
        ("page", "9" * 5000),
    ],
)
def test_invalid_values_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        asked({name: value})
    assert refused.value.argument == name


def test_missing_name_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="name is"):
        asked({}).text("name")


@pytest.mark.parametrize("name", ["a/b", "..", "?x=1&y=2#z", "é\U0001f600", "<script>", "a b+c%20", "\\", "\n"])
def test_addresses_keep_any_name(name: str) -> None:
    found = address("/agent", {"name": name, "window": None, "page": ""})
    assert found.isascii()
    parts = urlsplit(found)
    assert (parts.path, parse_qs(parts.query), parts.fragment) == ("/agent", {"name": [name]}, "")


def test_address_without_options_is_the_path() -> None:
    assert address("/agents", {"match": "", "page": None}) == "/agents"
