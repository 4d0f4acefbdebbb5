"""An entry's bytes: a stored entry is parsed back, and any other bytes are undecodable."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis import keys as key_names
from agentperf_redis.cache import entry_format
from agentperf_redis.errors import Undecodable


@given(
    st.integers(1, 2**53),
    st.integers(0, entry_format.LAST_MS),
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    st.lists(st.text(min_size=1)),
    st.binary(),
)
def test_stored_entry_is_parsed_back(
    version: int, expires: int, cost: int, fresh: int, tags: list[str], data: bytes
) -> None:
    names = tuple(key_names.encoded(tag) for tag in tags if tag.isprintable())
    stored = entry_format.parse(
        f"{version} {expires} ".encode() + entry_format.payload("request", cost, fresh, names, data)
    )
    stale_at = version // 100 + fresh if fresh else 0
    assert stored == entry_format.Stored(version, expires, cost, stale_at, names, data)


@given(st.binary())
def test_any_bytes_are_an_entry_or_undecodable(data: bytes) -> None:
    for parse in (entry_format.parse, entry_format.parse_invalidation_epoch):
        try:
            parse(data)
        except Undecodable:
            continue


def test_timestamp_follows_the_server_clock() -> None:
    assert entry_format.timestamp(178_000_000_012_345) == datetime.fromtimestamp(1_780_000_000.12345, UTC)


@pytest.mark.parametrize("facts", [b"-1 0", b"1 -5", b"1 9999999999999999"])
def test_entry_with_impossible_time_is_undecodable(facts: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse(facts + b" r 0 0  m\x01")
