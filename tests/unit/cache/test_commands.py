"""The commands of a cache: every reply is decoded or raises CorruptState, and the scripts run on a fake server.

The fake server behaves almost like a real one. Where the two differ, the integration tests decide.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from redis.exceptions import ResponseError

from agentperf_redis import keys as key_names
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.commands import entries, inspection
from agentperf_redis.cache.commands.entries import PutResult
from agentperf_redis.cache.model import Policy, Settings
from agentperf_redis.cache.process.access_buffer import NO_REPORT, AccessReport
from agentperf_redis.codec.codec import Codec
from agentperf_redis.command import Command
from agentperf_redis.errors import CorruptState
from tests.support.examples import examples
from tests.support.fake import Fake

KEYS = key_names.cache("ns", "cache", "c")
SETTINGS = Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 60_000))


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
    commands.pop(KEYS, "k", "rrrrr", until_ms=1, again=False, seen=0, origin="o"),
    commands.time_to_live(KEYS, "k"),
    inspection.left_ms(KEYS, "k"),
    commands.relayout(KEYS, "begin", 4, 0),
    commands.fence(KEYS, "o"),
    commands.prepare(KEYS, 1, (1, 2), (0,) * len(commands.COUNTERS)),
    commands.present(KEYS, "k"),
    commands.frozen_epochs(KEYS),
    commands.expect(KEYS, ["k"]),
    commands.export(KEYS, ["k"]),
    commands.adopt(KEYS, [("k", 1, commands.Exported(b"1 0 r 0 0  m", 0, 3, b"16", -1))]),
    commands.forget(KEYS, ["k"]),
    commands.thin(KEYS, 1, 0),
    commands.lower(KEYS, (1, 1)),
    commands.retire(KEYS, 1),
    commands.put(
        *(KEYS, "k", b".rrrrrm", "rrrrr"),
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
    st.one_of(st.none(), st.integers(-9, 9), st.binary(max_size=3)), lambda items: st.lists(items, max_size=4)
)


@examples(100, 1500)
def test_every_reply_is_decoded_or_corrupt(examples: int) -> None:
    @effort(max_examples=examples)
    @given(st.sampled_from(ALL_COMMANDS), REPLIES)
    def decode(command: Command[Any], reply: Any) -> None:
        try:
            command.decode(reply)
        except CorruptState as corrupt:
            assert corrupt.key  # noqa: PT017  not every reply raises an error

    decode()


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        (commands.read(KEYS, "k"), [None]),
        (commands.read_many(KEYS, ["k", "l"]), [None, None]),
        (commands.invalidation_epoch(KEYS), []),
        (commands.stored_settings(KEYS), [b"x", b"9" * 5000]),
    ],
)
def test_reply_of_another_length_is_corrupt_state(command: Command[Any], reply: Any) -> None:
    with pytest.raises(CorruptState):
        command.decode(reply)


def test_all_keys_of_a_command_share_a_slot() -> None:
    for command in ALL_COMMANDS:
        assert all(key.startswith("ns:{cache:c}:") for key in command.keys)


# The tests below run the scripts on a fake server.

FAR = 10**14


def deployed(fake: Fake, settings: Settings) -> None:
    assert isinstance(fake.run(commands.deploy(KEYS, settings)), commands.Deployed)


def put(fake: Fake, name: str, report: AccessReport = NO_REPORT, **options: Any) -> commands.PutReply:
    defaults: dict[str, Any] = {
        "until_ms": FAR,
        "seen": 0,
        "again": False,
        "ttl_ms": -1,
        "tier": None,
        "token": "",
        "origin": "me",
        "writer": "me",
        "tags": (),
    }
    reply = fake.run(commands.put(KEYS, name, b".rrrrrm\x01", "rrrrr", report=report, **{**defaults, **options}))
    assert isinstance(reply, commands.PutReply)
    return reply


def test_scripts_do_nothing_without_settings(fake: Fake) -> None:
    assert put(fake, "k").outcome is PutResult.NO_SETTINGS
    assert fake.run(commands.report_reads(KEYS, "me", AccessReport(1, 1, 0, 0, ()))) is None
    assert fake.run(commands.delete(KEYS, ["k"], "me")) is commands.NO_SETTINGS
    assert fake.client.keys() == []


@pytest.mark.parametrize("policy", list(Policy))
def test_packed_numbers_match_in_lua_and_python(fake: Fake, policy: Policy) -> None:
    deployed(fake, Settings(policy, (0, 0, 5), 0, (0, 0, 0)))
    put(fake, "name")
    put(fake, "other", report=AccessReport(1, 0, 0, 0, (("name", 3),)))
    size_bytes = len("name") + len(b".rrrrrm\x01")
    size = fake.run(inspection.size_of(KEYS, "name"))
    clock = int(fake.client.hget(KEYS.meta, "clock") or 0) - 1  # the put of `other` has advanced the clock by 1
    score = fake.run(inspection.score(KEYS.cold, "name"))  # under tinylfu, the put of `other` has moved `name` to cold

    assert size is not None
    assert score is not None
    assert size == (3, size_bytes)
    assert fake.client.hget(KEYS.size, "name") == entry_format.pack_size(*size)
    assert fake.client.hget(KEYS.size, "other") == entry_format.pack_size(0, size_bytes + 1)
    frequency = 4 if policy is Policy.TINYLFU else 0
    assert score == entry_format.pack_score(clock, frequency)
    assert entry_format.unpack_score(score) == (clock, frequency)


@pytest.mark.parametrize("again", [False, True])
def test_cancelled_put_has_no_effect(fake: Fake, *, again: bool) -> None:
    deployed(fake, Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 0)))
    fake.run(commands.cancel_puts(KEYS, (padded("r"), "rrrrr"), FAR))
    newer = fake.run(
        commands.put(
            *(KEYS, "k", b".otherm\x02", "other"),
            until_ms=FAR, seen=0, again=False, ttl_ms=-1, tier=None, token="", origin="me", writer="me",
            report=NO_REPORT, tags=(),
        )
    )  # fmt: skip
    assert newer.outcome is PutResult.STORED
    before = fake.client.get(KEYS.entry_prefix + "k")

    assert put(fake, "k", seen=1, again=again).outcome is PutResult.IN_DOUBT

    assert fake.client.get(KEYS.entry_prefix + "k") == before


# Puts with a mode, and pops

UNLIMITED = Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 0))


def padded(request: str) -> str:
    """Return a request id of the length that entries require."""
    return request.ljust(5, "_")


def store(fake: Fake, mode: str, request: str, value: object = 1, **options: Any) -> commands.PutReply:
    defaults: dict[str, Any] = {
        "until_ms": FAR,
        "seen": 0,
        "again": False,
        "ttl_ms": -1,
        "tags": (),
    }
    options = {**defaults, **options}
    request = padded(request)
    payload = entry_format.payload(request, 0, 0, options["tags"], Codec().encode(value))
    made = commands.put(
        *(KEYS, "k", payload, request),
        **options,
        tier=None,
        token="",
        origin="me",
        writer="me",
        report=NO_REPORT,
        mode=mode,
    )
    reply = fake.run(made)
    assert isinstance(reply, commands.PutReply)
    return reply


def pop(fake: Fake, request: str, *, again: bool = False, until_ms: int = FAR) -> commands.PopReply:
    reply = fake.run(commands.pop(KEYS, "k", padded(request), until_ms=until_ms, again=again, seen=0, origin="me"))
    assert isinstance(reply, commands.PopReply)
    return reply


def value_of(fake: Fake) -> object:
    entry, _ = fake.run(commands.read(KEYS, "k"))
    return None if entry is None else Codec().decode(entry_format.parse(entry).data)


def test_incr_reads_and_writes_integers_as_the_codec_does() -> None:
    bound = 2**53 - 1
    edges = {
        sign * 2**power + more for power in (0, 5, 7, 8, 15, 16, 31, 32, 52) for more in (-1, 0, 1) for sign in (-1, 1)
    }
    with closing(Fake()) as fake:
        deployed(fake, UNLIMITED)
        for number in sorted(edge for edge in edges if abs(edge) < bound):
            store(fake, commands.Mode.ALWAYS, "a", number)
            assert store(fake, commands.Mode.increment(1), f"r{number}").number == number + 1
            entry, _ = fake.run(commands.read(KEYS, "k"))
            assert entry_format.parse(entry).data == Codec().encode(number + 1)


@pytest.mark.parametrize(
    "value", [1.0, True, None, "1", "", b"\x01", [1], 2**53, -(2**53), 2**64 - 1, -(2**63), 2**70, {}, "x" * 300]
)
def test_incr_refuses_other_values_unchanged(fake: Fake, value: object) -> None:
    deployed(fake, UNLIMITED)
    store(fake, commands.Mode.ALWAYS, "a", value)
    before = fake.client.dump(KEYS.entry("k"))
    assert store(fake, commands.Mode.increment(1), "b").outcome is PutResult.NO_INTEGER
    assert fake.client.dump(KEYS.entry("k")) == before


@pytest.mark.parametrize(("number", "by"), [(2**53 - 1, 1), (1 - 2**53, -1), (2**52, 2**52), (2**53 - 1, 2**53 - 1)])
def test_incr_refuses_inexact_sums(fake: Fake, number: int, by: int) -> None:
    deployed(fake, UNLIMITED)
    store(fake, commands.Mode.ALWAYS, "a", number)
    assert store(fake, commands.Mode.increment(by), "b").outcome is PutResult.OUT_OF_RANGE
    assert value_of(fake) == number


@pytest.mark.parametrize("number", [100, None])
def test_too_large_number_changes_nothing(fake: Fake, number: int | None) -> None:
    deployed(fake, UNLIMITED)
    if number is not None:
        store(fake, commands.Mode.ALWAYS, "a", number)
    weight = int(fake.client.hget(KEYS.size, "k") or 5)
    deployed(fake, Settings(Policy.LRU, (0, 0, 5), weight, (0, 0, 0)))
    before = (fake.client.dump(KEYS.entry("k")), fake.client.hgetall(KEYS.size), fake.client.hgetall(KEYS.meta))
    for again in (False, True):
        reply = store(fake, commands.Mode.increment(2**40), "b", 2**40, again=again)
        assert reply.outcome is PutResult.TOO_LARGE
    after = (fake.client.dump(KEYS.entry("k")), fake.client.hgetall(KEYS.size), fake.client.hgetall(KEYS.meta))
    assert after == before


@pytest.mark.parametrize("policy", [Policy.LRU, Policy.TINYLFU])
def test_number_without_capacity_leaves_the_old_one(fake: Fake, policy: Policy) -> None:
    deployed(fake, Settings(policy, (0, 0, 5), 100, (0, 0, 60_000)))
    store(fake, commands.Mode.ALWAYS, "a", 100)
    before = (fake.client.dump(KEYS.entry("k")), fake.client.hgetall(KEYS.size))
    fake.client.hincrby(KEYS.meta, "bytes", 10_000)  # imitates a cache in which one call cannot evict enough

    for again in (False, True):
        reply = store(fake, commands.Mode.increment(2**40), "b", 2**40, again=again)
        assert reply.outcome is PutResult.NO_CAPACITY

    assert (fake.client.dump(KEYS.entry("k")), fake.client.hgetall(KEYS.size)) == before
    assert fake.client.hget(KEYS.meta, "bytes") == str(10_000 + int(before[1]["k"]))
    fake.client.hincrby(KEYS.meta, "bytes", -10_000)
    assert store(fake, commands.Mode.increment(1), "c").number == 101


def test_incr_keeps_tags_expiry_key_and_freshness(fake: Fake) -> None:
    deployed(fake, UNLIMITED)
    key = "long " * 50
    name = key_names.stored_name(key)
    request = entry_format.new_request()
    payload = entry_format.payload(request, 77, 50_000, ("t", "u"), Codec().encode(300), key, name)
    options: dict[str, Any] = {"until_ms": FAR, "seen": 0, "again": False, "tier": None, "token": "", "origin": "me"}
    options |= {"writer": "me", "report": NO_REPORT, "tags": ()}
    fake.run(commands.put(KEYS, name, payload, request, ttl_ms=90_000, **options))
    before = entry_format.parse(fake.run(commands.read(KEYS, name))[0])

    reply = fake.run(
        commands.put(KEYS, name, b".xxxxxm", "xxxxx", ttl_ms=0, mode=commands.Mode.increment(-400), **options)
    )

    after = entry_format.parse(fake.run(commands.read(KEYS, name))[0])
    assert (reply.number, Codec().decode(after.data)) == (-100, -100)
    assert after.version == reply.version > before.version
    assert (after.tags, after.cost_ms, entry_format.held_key(after, name)) == (("t", "u"), 77, key)
    assert after.expires_ms == pytest.approx(before.expires_ms, abs=1)
    assert after.fresh_until_ms == pytest.approx(before.fresh_until_ms, abs=10)


MODES: dict[str, tuple[object, object]] = {
    "add": (None, 5),
    "replace": (3, 5),
    "touch": (3, 3),
    "incr:5": (3, 8),
    "incrxx:5": (3, 8),
}
"""For each mode, a previous value with which a put in this mode succeeds, and the value after the put."""


@pytest.mark.parametrize("mode", MODES)
def test_repeated_request_is_executed_once(fake: Fake, mode: str) -> None:
    deployed(fake, UNLIMITED)
    before, after = MODES[mode]
    if before is not None:
        store(fake, commands.Mode.ALWAYS, "a", before)
    first = store(fake, mode, "r", 5, ttl_ms=60_000)
    assert (first.outcome, value_of(fake)) == (PutResult.STORED, after)
    store(fake, commands.Mode.ALWAYS, "b", "newer")  # a put after `first`, without a TTL

    copies = [store(fake, mode, "r", 5, again=again, ttl_ms=60_000) for again in (True, False)]

    assert copies == [first, first]
    assert (value_of(fake), fake.client.pttl(KEYS.entry("k"))) == ("newer", -1)


@pytest.mark.parametrize("mode", ["add", "replace", "if:0", "incr:5", "incrxx:5"])
def test_copy_of_a_request_finds_its_entry_without_its_reply(fake: Fake, mode: str) -> None:
    """A full server with a policy volatile-* evicts keys with a TTL, including the reply stored for other copies."""
    deployed(fake, UNLIMITED)
    before, _ = MODES.get(mode, (None, None))
    if before is not None:
        store(fake, commands.Mode.ALWAYS, "a", before)
    first = store(fake, mode, "r", 5)
    after = fake.client.dump(KEYS.entry("k"))
    assert fake.client.delete(KEYS.reply_prefix + padded("r")) == 1

    assert [store(fake, mode, "r", 5, again=again) for again in (True, False)] == [first, first]

    assert fake.client.dump(KEYS.entry("k")) == after


@pytest.mark.parametrize("mode", MODES)
def test_late_copy_of_a_refused_request_does_nothing(fake: Fake, mode: str) -> None:
    deployed(fake, UNLIMITED)
    refusing, refused = (1, PutResult.CONDITION_FAILED) if mode == "add" else (None, PutResult.CONDITION_FAILED)
    if mode.startswith("incr"):
        refusing, refused = "text", PutResult.NO_INTEGER  # type: ignore[assignment]
    if refusing is not None:
        store(fake, commands.Mode.ALWAYS, "a", refusing)
    assert store(fake, mode, "r", 5, again=True).outcome is refused
    fake.run(commands.delete(KEYS, ["k"], "me"))
    if mode != "add":
        store(fake, commands.Mode.ALWAYS, "b", 3)
    before = value_of(fake)

    assert store(fake, mode, "r", 5, ttl_ms=60_000).outcome is refused

    assert value_of(fake) == before


@pytest.mark.parametrize("mode", MODES)
def test_cancelled_request_with_a_mode_does_nothing(fake: Fake, mode: str) -> None:
    deployed(fake, UNLIMITED)
    fake.run(commands.cancel_puts(KEYS, (padded("r"), "rrrrr"), FAR))
    before, _ = MODES[mode]
    if before is not None:
        store(fake, commands.Mode.ALWAYS, "a", before)
    assert store(fake, mode, "r", 5, ttl_ms=60_000).outcome is PutResult.IN_DOUBT
    assert (value_of(fake), fake.client.pttl(KEYS.entry("k"))) == (before, -1 if before else -2)


@pytest.mark.parametrize("mode", MODES)
def test_overdue_request_with_a_mode_does_nothing(fake: Fake, mode: str) -> None:
    deployed(fake, UNLIMITED)
    before, _ = MODES[mode]
    if before is not None:
        store(fake, commands.Mode.ALWAYS, "a", before)
    assert store(fake, mode, "r", until_ms=1).outcome is PutResult.LATE
    assert store(fake, mode, "r", until_ms=1, again=True).outcome is PutResult.IN_DOUBT
    assert value_of(fake) == before


def test_repeated_request_with_a_mode_checks_resent_before_it_writes(fake: Fake) -> None:
    deployed(fake, Settings(Policy.LRU, (0, 0, 5), 100, (0, 0, 0)))
    store(fake, commands.Mode.ALWAYS, "a", 3)
    before = fake.client.dump(KEYS.entry("k"))
    fake.client.set(KEYS.resent, "no sorted set")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        store(fake, commands.Mode.REPLACE, "r", "x" * 200, again=True)
    assert (fake.client.dump(KEYS.entry("k")), fake.client.hlen(KEYS.size)) == (before, 1)


def test_put_at_version_never_overwrites_another_version(fake: Fake) -> None:
    deployed(fake, UNLIMITED)
    at = commands.Mode.at_version
    assert store(fake, at(7), "a").outcome is PutResult.CONDITION_FAILED
    first = store(fake, at(0), "b", "first")
    assert first.outcome is PutResult.STORED
    assert store(fake, at(0), "c").outcome is PutResult.CONDITION_FAILED
    second = store(fake, at(first.version), "d", "second")
    assert second.outcome is PutResult.STORED
    assert store(fake, at(first.version), "e").outcome is PutResult.CONDITION_FAILED
    assert store(fake, at(first.version), "d", "second", again=True) == second, "the copy of a lost reply"
    assert value_of(fake) == "second"


@pytest.mark.parametrize("gone", ["expired", "deleted", "cleared", "tagged", "damaged"])
def test_modes_treat_an_invalid_value_as_missing(fake: Fake, gone: str) -> None:
    deployed(fake, UNLIMITED)
    reply = store(fake, commands.Mode.ALWAYS, "a", 3, tags=("t",))
    match gone:
        case "expired":
            fake.client.delete(KEYS.entry("k"))
        case "deleted":
            fake.run(commands.delete(KEYS, ["k"], "me"))
        case "cleared":
            fake.run(commands.clear(KEYS, "me"))
        case "tagged":
            fake.run(commands.invalidate_tags(KEYS, ("t",), "me"))
        case "damaged":
            fake.client.set(KEYS.entry("k"), "no entry")
    before = fake.client.dump(KEYS.entry("k"))
    for mode in ("touch", "replace", f"if:{reply.version}"):
        assert store(fake, mode, mode, ttl_ms=0).outcome is PutResult.CONDITION_FAILED
    assert fake.run(commands.time_to_live(KEYS, "k")) is None
    assert pop(fake, "p").outcome is PutResult.CONDITION_FAILED
    assert fake.client.dump(KEYS.entry("k")) == before
    assert store(fake, "incr:4", "i", 4).number == 4


def test_touch_keeps_the_version_and_the_compute_lease(fake: Fake) -> None:
    deployed(fake, UNLIMITED)
    first = store(fake, commands.Mode.ALWAYS, "a", 3)
    fake.run(
        commands.claim(KEYS, "k", "token", lease_ms=5000, ignore=entry_format.version_digits(first.version).decode())
    )
    assert store(fake, commands.Mode.TOUCH, "b", b"", ttl_ms=60_000).outcome is PutResult.STORED
    entry = entry_format.parse(fake.run(commands.read(KEYS, "k"))[0])
    assert (entry.version, Codec().decode(entry.data)) == (first.version, 3)
    assert 0 < fake.run(commands.time_to_live(KEYS, "k")) <= 60_000
    assert fake.client.hget(KEYS.lease("k"), "token") == "token"
    assert store(fake, commands.Mode.TOUCH, "c", b"", ttl_ms=0).outcome is PutResult.STORED
    assert fake.run(commands.time_to_live(KEYS, "k")) == -1


def test_repeated_pop_returns_the_same_value(fake: Fake) -> None:
    deployed(fake, UNLIMITED)
    store(fake, commands.Mode.ALWAYS, "a", "old")
    first = pop(fake, "p")
    assert first.outcome is PutResult.STORED
    assert (value_of(fake), fake.client.hlen(KEYS.size)) == (None, 0)
    store(fake, commands.Mode.ALWAYS, "b", "newer")
    for again in (True, False):
        copy = pop(fake, "p", again=again)
        assert (copy.outcome, copy.entry) == (PutResult.STORED, first.entry)
    assert value_of(fake) == "newer"
    assert pop(fake, "p2", until_ms=1).outcome is PutResult.LATE


def test_late_copy_of_an_empty_pop_removes_nothing(fake: Fake) -> None:
    deployed(fake, UNLIMITED)
    assert pop(fake, "p", again=True).outcome is PutResult.CONDITION_FAILED
    store(fake, commands.Mode.ALWAYS, "a", "newer")
    assert pop(fake, "p").outcome is PutResult.CONDITION_FAILED
    fake.run(commands.cancel_puts(KEYS, (padded("q"),), FAR))
    assert pop(fake, "q").outcome is PutResult.IN_DOUBT
    assert value_of(fake) == "newer"


def test_replies_for_copies_expire_with_the_requests(fake: Fake) -> None:
    deployed(fake, UNLIMITED)
    until_ms = int(time.time() * 1000) + 60_000
    store(fake, "add", "a", until_ms=until_ms)
    store(fake, "add", "b", again=True, until_ms=until_ms)
    pop(fake, "c", until_ms=until_ms)
    pop(fake, "d", again=True, until_ms=until_ms)
    left_ms = [fake.client.pttl(KEYS.reply_prefix + padded(request)) for request in "abcd"]
    assert all(0 < each <= 60_002 for each in left_ms), left_ms


def test_put_evicts_like_a_textbook_lru(fake: Fake) -> None:
    deployed(fake, Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 0)))
    chance, model, seq = random.Random(3), OrderedDict[str, None](), 0
    for _ in range(200):
        name = f"k{chance.randrange(9)}"
        if name in model and chance.random() < 0.5:
            seq += 1
            assert fake.run(commands.report_reads(KEYS, "me", AccessReport(seq, 0, 0, 0, ((name, 1),))))
        else:
            assert put(fake, name).outcome is PutResult.STORED
        model[name] = None
        model.move_to_end(name)
        while len(model) > 5:
            model.popitem(last=False)
        assert fake.client.zrange(KEYS.cold, 0, -1) == list(model)


def test_report_counts_once_on_any_command(fake: Fake) -> None:
    deployed(fake, Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 0)))
    put(fake, "a")
    report = AccessReport(1, 2, 30, 1, (("a", 2), ("gone", 1)))
    for _ in range(2):
        assert put(fake, "b", report).outcome is PutResult.STORED
        assert fake.run(commands.report_reads(KEYS, "me", report))
    _, counters = fake.run(inspection.counters(KEYS))
    assert {name: counters[name] for name in ("cold", "misses", "saved_ms", "corrupt")} == {
        "cold": 3,
        "misses": 2,
        "saved_ms": 30,
        "corrupt": 1,
    }


def test_repeated_claims_get_the_same_reply(fake: Fake) -> None:
    deployed(fake, Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 0)))

    def claim(token: str, ignore: str = "", awaited: str = "") -> Any:
        return fake.run(commands.claim(KEYS, "k", token, lease_ms=5000, ignore=ignore, awaited=awaited))

    lead = claim("one")
    assert claim("one") == lead
    waiting = claim("two")
    assert isinstance(waiting, commands.Await)
    assert waiting.token == "one"
    release = commands.release(KEYS, "k", "one", error="ValueError no luck", error_ms=5000, origin="me")
    assert [fake.run(release), fake.run(release)] == [True, False]
    assert claim("two", awaited="one") == commands.Failed("ValueError", "no luck")
    assert isinstance(claim("three"), commands.Lead), "a caller that did not wait for the error computes again"
    assert fake.run(commands.renew(KEYS, "k", "three", 5000)) is True
    assert fake.run(commands.renew(KEYS, "k", "one", 5000)) is False
    assert put(fake, "k", token="one").outcome is PutResult.LEASE_LOST
    assert put(fake, "k", token="three").outcome is PutResult.STORED
    assert isinstance(claim("four"), commands.Hit)
    version = fake.client.get(KEYS.entry("k"))[:8]
    assert isinstance(claim("four", ignore=version), commands.Lead)


@pytest.mark.parametrize("forget", ["delete", "clear", "tag", "put"])
def test_value_begun_before_invalidation_is_refused(fake: Fake, forget: str) -> None:
    deployed(fake, Settings(Policy.TINYLFU, (1, 1, 3), 0, (0, 0, 0)))
    fake.run(commands.claim(KEYS, "k", "token", lease_ms=5000, ignore="", awaited=""))
    match forget:
        case "delete":
            fake.run(commands.delete(KEYS, ["k"], "me"))
        case "clear":
            fake.run(commands.clear(KEYS, "me"))
        case "tag":
            fake.run(commands.invalidate_tags(KEYS, ("t",), "me"))
        case "put":
            put(fake, "k")
    outcome = put(fake, "k", token="token", tags=("t",)).outcome
    assert outcome is (PutResult.INVALIDATED if forget in ("clear", "tag") else PutResult.LEASE_LOST)
    assert not fake.client.exists(KEYS.lease("k"))


def test_excess_tag_marks_merge_without_losing_invalidations(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "MAX_TAG_MARKS", 3)
    versions = [fake.run(commands.invalidate_tags(KEYS, (f"t{number}",), "me")) for number in range(5)]
    assert fake.client.zcard(KEYS.tags) == 3
    floor, tagged, tagged_cleared_until = fake.client.get(KEYS.epochs).split()
    assert (int(floor), int(tagged), int(tagged_cleared_until)) == (0, versions[4], versions[1])
