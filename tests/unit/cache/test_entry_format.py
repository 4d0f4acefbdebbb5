"""An entry's bytes: a stored entry is parsed back, and any other bytes are undecodable."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import Enum

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


@given(st.text(min_size=1, max_size=300), st.binary())
def test_long_key_is_held_by_its_entry(key: str, data: bytes) -> None:
    long = key * (121 // len(key.encode(errors="replace")) + 1)
    name = key_names.stored_name(long)
    request = entry_format.new_request(long, name)
    stored = entry_format.parse(b"1 0 " + entry_format.payload(request, 0, 0, (), data, long))
    assert (stored.data, entry_format.held_key(stored, name)) == (data, long)
    assert entry_format.held_key(stored, name + "0") is None


@pytest.mark.parametrize("key", ["short", "x" * 4097])
def test_other_keys_are_not_held(key: str) -> None:
    name = key_names.stored_name(key)
    request = entry_format.new_request(key, name)
    stored = entry_format.parse(b"1 0 " + entry_format.payload(request, 0, 0, (), b"m", key))
    assert (len(request), stored.data, stored.key, entry_format.held_key(stored, name)) == (12, b"m", b"", None)


@pytest.mark.parametrize("size", [b"", b"x", b"-1", b"4097", b"9" * 30])
def test_key_of_impossible_size_is_undecodable(size: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse(b"1 0 r~" + size + b" 0 0  m\x01")


def test_damaged_key_is_not_held() -> None:
    stored = entry_format.parse(b"1 0 r~2 0 0  \xff\xffm\x01")
    assert (stored.data, entry_format.held_key(stored, "n")) == (b"m\x01", None)


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


@pytest.mark.parametrize("bad", [b"-1", b"+1", b"1_0", b"", b"1.5", b"nan", b"9" * 25])
@pytest.mark.parametrize("at", [0, 1, 3, 4], ids=["version", "expires", "cost", "fresh"])
def test_entry_with_a_malformed_number_is_undecodable(at: int, bad: bytes) -> None:
    fields = [b"1", b"0", b"r", b"0", b"0", b"", b"m\x01"]
    assert entry_format.parse(b" ".join(fields))
    fields[at] = bad
    with pytest.raises(Undecodable):
        entry_format.parse(b" ".join(fields))


@pytest.mark.parametrize("epoch", [b"1 2", b"1 2 3 4", b"1 -2 3", b"1 2 +3", b"1_0 2 3", b"1  3", b"1 2 " + b"9" * 25])
def test_malformed_invalidation_epoch_is_undecodable(epoch: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse_invalidation_epoch(epoch)


class Key(str, Enum):  # noqa: UP042  its format() is not its value, unlike that of a StrEnum
    LONG = "k" * 500


def test_key_that_is_a_member_of_an_enum_is_held_by_its_value() -> None:
    name = key_names.stored_name(Key.LONG)
    request = entry_format.new_request(Key.LONG, name)
    stored = entry_format.parse(b"1 0 " + entry_format.payload(request, 0, 0, (), b"m", Key.LONG))
    assert entry_format.held_key(stored, name) == "k" * 500
    assert stored.data == b"m"
