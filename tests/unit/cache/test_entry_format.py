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

VERSION = entry_format.version_digits(178_000_000_012_345)


def stored_form(version: int, expires_ms: int, payload: bytes) -> bytes:
    """Do what `write_entry` of header.lua does."""
    middle = b"" if payload[:1] == b"." else f"{expires_ms} ".encode()
    return entry_format.version_digits(version) + payload[:6] + middle + payload[6:]


@given(
    st.integers(0, entry_format.MAX_VERSION),
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
    entry = stored_form(version, expires, entry_format.payload("request", cost, fresh, names, data))
    stale_at = version // 100 + fresh if fresh else 0
    known_ms = expires if cost or fresh or names else 0
    assert entry_format.parse(entry) == entry_format.Stored(version, known_ms, cost, stale_at, names, data)


@given(st.binary())
def test_plain_entry_has_a_header_of_14_bytes(data: bytes) -> None:
    assert len(stored_form(1, 5, entry_format.payload("request", 0, 0, (), data, "k", "k"))) == 14 + len(data)


@given(st.text(min_size=1, max_size=300), st.binary())
def test_long_key_is_held_by_its_entry(key: str, data: bytes) -> None:
    long = key * (121 // len(key.encode(errors="replace")) + 1)
    name = key_names.stored_name(long)
    stored = entry_format.parse(stored_form(1, 0, entry_format.payload("request", 0, 0, (), data, long, name)))
    assert (stored.data, entry_format.held_key(stored, name)) == (data, long)
    assert entry_format.held_key(stored, name + "0") is None


@pytest.mark.parametrize("key", ["short", "x" * 4097])
def test_other_keys_are_not_held(key: str) -> None:
    name = key_names.stored_name(key)
    stored = entry_format.parse(stored_form(1, 0, entry_format.payload("request", 0, 0, (), b"m", key, name)))
    assert (stored.data, stored.key, entry_format.held_key(stored, name)) == (b"m", b"", None)


@pytest.mark.parametrize("size", [b"", b"x", b"-1", b"4097", b"9" * 30])
def test_key_of_impossible_size_is_undecodable(size: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse(VERSION + b"+reque0 0 0  " + size + b" m\x01")


def test_damaged_key_is_not_held() -> None:
    stored = entry_format.parse(VERSION + b"+reque0 0 0  2 \xff\xffm\x01")
    assert (stored.data, entry_format.held_key(stored, "n")) == (b"m\x01", None)


@given(st.binary() | st.builds(VERSION.__add__, st.binary()))
def test_any_bytes_are_an_entry_or_undecodable(data: bytes) -> None:
    for parse in (entry_format.parse, entry_format.parse_invalidation_epoch):
        try:
            parse(data)
        except Undecodable:
            continue


def test_timestamp_follows_the_server_clock() -> None:
    assert entry_format.timestamp(178_000_000_012_345) == datetime.fromtimestamp(1_780_000_000.12345, UTC)


@pytest.mark.parametrize("expiry", [b"-5", b"9999999999999999"])
def test_entry_with_impossible_time_is_undecodable(expiry: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse(VERSION + b"+reque" + expiry + b" 0 0  0 m\x01")


@pytest.mark.parametrize(
    "entry",
    [
        *(VERSION[:cut] for cut in range(8)),
        VERSION,
        VERSION + b".requ",
        VERSION + b"?requem\x01",
        VERSION + b".re ue" + b"m\x01",
        b" " + VERSION[1:] + b".requem\x01",
        VERSION[:7] + b"\x7f.requem\x01",
        b"178463520012345 1784635500123 Yk3vPq0w1250 0 0  m\x01",
    ],
)
def test_entry_with_another_header_is_undecodable(entry: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse(entry)


@pytest.mark.parametrize("bad", [b"-1", b"+1", b"1_0", b"", b"1.5", b"nan", b"9" * 25])
@pytest.mark.parametrize("at", [0, 1, 2, 4], ids=["expires", "cost", "fresh", "size"])
def test_entry_with_a_malformed_number_is_undecodable(at: int, bad: bytes) -> None:
    fields = [b"0", b"0", b"0", b"", b"0", b"m\x01"]
    assert entry_format.parse(VERSION + b"+reque" + b" ".join(fields))
    fields[at] = bad
    with pytest.raises(Undecodable):
        entry_format.parse(VERSION + b"+reque" + b" ".join(fields))


@given(st.integers(0, entry_format.MAX_VERSION))
def test_version_is_read_from_its_digits(version: int) -> None:
    digits = entry_format.version_digits(version)
    assert (entry_format.version_of(digits + b".x"), entry_format.version_text(digits + b".x")) == (
        version,
        digits.decode(),
    )


@pytest.mark.parametrize("entry", [None, b"", b"1234567", b"no entry"])
def test_damaged_entry_has_no_version(entry: bytes | None) -> None:
    assert entry_format.version_text(entry) == ""


@given(st.integers(0, 10**15), st.integers(0, 10**10 - 1))
def test_hits_and_bytes_are_read_back(hits: int, size_bytes: int) -> None:
    packed = entry_format.pack_size(hits, size_bytes)
    assert int(packed) == hits * 10**10 + size_bytes
    assert entry_format.unpack_size(packed) == entry_format.unpack_size(packed.encode()) == (hits, size_bytes)


@pytest.mark.parametrize("packed", ["", "x", "-1", "1 x", " 1", "1 2 3", "1.5", "nan", "9" * 27, "\u0661"])
def test_damaged_hits_and_bytes_are_refused(packed: str) -> None:
    with pytest.raises(ValueError, match=r".?"):
        entry_format.unpack_size(packed)


@pytest.mark.parametrize("epoch", [b"1 2", b"1 2 3 4", b"1 -2 3", b"1 2 +3", b"1_0 2 3", b"1  3", b"1 2 " + b"9" * 25])
def test_malformed_invalidation_epoch_is_undecodable(epoch: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse_invalidation_epoch(epoch)


class Key(str, Enum):  # noqa: UP042  unlike with a StrEnum, `format()` does not return the value
    LONG = "k" * 500


def test_key_that_is_a_member_of_an_enum_is_held_by_its_value() -> None:
    name = key_names.stored_name(Key.LONG)
    stored = entry_format.parse(stored_form(1, 0, entry_format.payload("request", 0, 0, (), b"m", Key.LONG, name)))
    assert entry_format.held_key(stored, name) == "k" * 500
    assert stored.data == b"m"
