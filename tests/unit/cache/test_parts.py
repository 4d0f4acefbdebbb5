"""The parts of a cache that need no server."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from agentperf_redis import keys as key_names
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.model import CacheEntry, CacheStats, Policy, Settings, TierStats, default_ttl_ms, ttl_ms
from agentperf_redis.cache.process.access_buffer import MAX_PENDING, MAX_READS, NO_REPORT, Outbox
from agentperf_redis.cache.process.flights import Flights, GivenUp, Landed
from agentperf_redis.command import Command
from agentperf_redis.errors import CorruptState, InvalidArgument, Undecodable

KEYS = key_names.cache("ns", "cache", "c")
SETTINGS = Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 60_000))


def test_settings_survive_their_text() -> None:
    for settings in (SETTINGS, Settings(Policy.TINYLFU, (1, 2, 3), 2**50, (1, 2, 3))):
        assert Settings.parse(settings.text) == settings
    assert SETTINGS.text == "lru capacity 0/0/5 bytes 0 ttl 0/0/60000"
    assert SETTINGS.shown("cache") == "max_size=5, max_bytes=None, default_ttl=60, policy='lru'"
    tiers = "hot_size=1, warm_size=2, cold_size=3, max_bytes=9, hot_ttl=0.5, warm_ttl=None, cold_ttl=60"
    assert Settings(Policy.LRU, (1, 2, 3), 9, (500, 0, 60_000)).shown("tiered") == f"{tiers}, policy='lru'"
    assert Settings.parse("mru capacity 1/2/3 bytes 0 ttl 0/0/0") is None


def test_lives_are_milliseconds_rounded_up() -> None:
    assert [ttl_ms("ttl", ttl) for ttl in (None, math.inf, 1, 0.001, 0.0015)] == [-1, 0, 1000, 1, 2]
    assert [default_ttl_ms("ttl", ttl) for ttl in (None, math.inf, 300)] == [0, 0, 300_000]
    with pytest.raises(InvalidArgument):
        ttl_ms("ttl", 0)


def test_an_entry_is_expired_when_its_time_is_over() -> None:
    now = datetime.now(UTC)
    assert CacheEntry("k", 1, now, now - timedelta(seconds=1)).is_expired()
    assert not CacheEntry("k", 1, now, now + timedelta(seconds=60)).is_expired()
    assert not CacheEntry("k", 1, now, None).is_expired()


def test_rates_of_an_unused_cache_are_zero() -> None:
    unused = TierStats(0, 5, 0, 0)
    assert (unused.hit_rate, unused.render()["hit_rate"]) == (0.0, "0.0%")
    assert CacheStats("c", "lru", SETTINGS, unused, unused, unused, 0, 0, 0, 0, 0, 0, 0, 0.0).hit_rate == 0.0


@given(
    st.integers(1, 2**53),
    st.integers(0, entry_format.LAST_MS),
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    st.lists(st.text(min_size=1)),
    st.binary(),
)
def test_what_is_stored_comes_back(
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
    for parse in (entry_format.parse, entry_format.parse_generation):
        try:
            parse(data)
        except Undecodable:
            continue


def test_a_moment_is_that_of_the_servers_clock() -> None:
    assert entry_format.moment(178_000_000_012_345) == datetime.fromtimestamp(1_780_000_000.12345, UTC)


ALL_COMMANDS: list[Command[Any]] = [
    commands.read(KEYS, "k"),
    commands.read_many(KEYS, ["k"]),
    commands.tag_marks(KEYS, ("t",)),
    commands.read_strictly(KEYS, "k"),
    commands.report_reads(KEYS, "w", NO_REPORT),
    commands.delete(KEYS, ["k"], "o"),
    commands.clear(KEYS, "o"),
    commands.invalidate_tags(KEYS, ("t",), "o"),
    commands.sweep(KEYS, "0"),
    commands.claim(KEYS, "k", "t", lease_ms=1, ignore="", awaited=""),
    commands.renew(KEYS, "k", "t", 1),
    commands.release(KEYS, "k", "t", error=None, error_ms=1, origin="o"),
    commands.deploy(KEYS, SETTINGS),
    commands.stored_settings(KEYS),
    inspection.counters(KEYS),
    inspection.members(KEYS.cold),
    inspection.size_of(KEYS, "k"),
    inspection.score(KEYS.cold, "k"),
    inspection.oldest_first(KEYS.cold, 0, 1),
    inspection.sizes_page(KEYS, "0", 10),
    inspection.beginning(KEYS, "k", 10),
    commands.computing_failed(KEYS, "k"),
    commands.put(
        *(KEYS, "k", b"r 0  m", "r"),
        until_ms=1,
        seen=0,
        again=False,
        ttl_ms=0,
        tier=None,
        token="",
        origin="o",
        writer="w",
        report=NO_REPORT,
        tags=("t",),
    ),
]
REPLIES = st.recursive(
    st.one_of(st.none(), st.integers(-7, 7), st.binary(max_size=3)), lambda items: st.lists(items, max_size=4)
)


@effort(max_examples=500)
@given(st.sampled_from(ALL_COMMANDS), REPLIES)
def test_every_reply_is_understood_or_corrupt(command: Command[Any], reply: Any) -> None:
    try:
        command.decode(reply)
    except CorruptState as corrupt:
        assert corrupt.key  # noqa: PT017  any other reply is fine


def test_all_keys_of_a_command_lie_in_one_slot() -> None:
    for command in ALL_COMMANDS:
        assert all(key.startswith("ns:{cache:c}:") for key in command.keys)


# the outbox


def outbox(announced: list[int]) -> Outbox:
    return Outbox(lambda: "me", lambda: announced.append(1))


def test_reads_are_reported_once_oldest_first() -> None:
    announced: list[int] = []
    box = outbox(announced)
    assert box.take() is NO_REPORT
    for name in ("a", "b", "a"):
        box.read(name, 10)
    box.missed()
    box.found_corrupt()
    box.missed()

    report = box.take()

    assert (report.seq, report.misses, report.saved_ms, report.corrupt) == (1, 2, 30, 1)
    assert report.reads == (("b", 1), ("a", 2))
    assert announced == [1]
    assert box.take() is NO_REPORT, "one is under way"
    box.settle(report, taken_in=True)
    assert box.take() is NO_REPORT
    assert not box.waits


def test_a_report_whose_fate_is_unknown_is_repeated_as_it_was() -> None:
    announced: list[int] = []
    box = outbox(announced)
    box.read("a", 0)
    report = box.take(flush=True)
    hint = box.flushing
    box.read("b", 0)
    box.settle(report, taken_in=False)
    assert hint is not None
    given: list[int] = []
    hint.call_when_given(lambda: given.append(1))
    assert given == [1]
    assert box.take() is report
    box.settle(report, taken_in=True)
    second = box.take()
    assert (second.seq, second.reads) == (2, (("b", 1),))


def test_reports_and_waiting_reads_are_bounded() -> None:
    box = outbox([])
    for number in range(MAX_PENDING + 10):
        box.read(str(number), 0)
    assert box.is_full
    report = box.take()
    assert len(report.reads) == MAX_READS
    assert report.reads[0] == ("10", 1), "the oldest were forgotten"


# flights


def test_one_flight_at_a_time() -> None:
    flights = Flights()
    first, asked = flights.join("k")
    assert asked is None, "begun by this call"
    flights.ask(first)
    assert flights.join("k") == (first, 1)
    flights.detach("k")
    second, asked = flights.join("k")
    assert second is not first
    assert asked is None
    flights.end(first, Landed(b"m"))
    flights.end(first, GivenUp())
    assert first.outcome == Landed(b"m"), "who had joined it is told, once"
    assert flights.join("k") == (second, 0), "the end of a detached flight leaves the next one alone"
    flights.detach_all()
    assert flights.join("k")[1] is None


@pytest.mark.parametrize("facts", [b"-1 0", b"1 -5", b"1 9999999999999999"])
def test_an_entry_of_an_impossible_time_is_none(facts: bytes) -> None:
    with pytest.raises(Undecodable):
        entry_format.parse(facts + b" r 0 0  m\x01")
