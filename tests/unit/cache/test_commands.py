"""The commands of a cache: every reply is decoded or raises CorruptState, and the scripts run on a fake server.

The fake server behaves almost like a real one. Where the two differ, the integration tests decide.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from agentperf_redis import keys as key_names
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.commands import entries, inspection
from agentperf_redis.cache.commands.entries import PutResult
from agentperf_redis.cache.model import Policy, Settings
from agentperf_redis.cache.process.access_buffer import NO_REPORT, AccessReport
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


@examples(250, 1500)
def test_every_reply_is_decoded_or_corrupt(examples: int) -> None:
    @effort(max_examples=examples)
    @given(st.sampled_from(ALL_COMMANDS), REPLIES)
    def decode(command: Command[Any], reply: Any) -> None:
        try:
            command.decode(reply)
        except CorruptState as corrupt:
            assert corrupt.key  # noqa: PT017  not every reply must raise

    decode()


def test_all_keys_of_a_command_share_a_slot() -> None:
    for command in ALL_COMMANDS:
        assert all(key.startswith("ns:{cache:c}:") for key in command.keys)


# The scripts on a fake server

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
    reply = fake.run(commands.put(KEYS, name, b"r 0  m\x01", "r", report=report, **{**defaults, **options}))
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
    size_bytes = len("name") + len(b"r 0  m\x01")
    size = fake.run(inspection.size_of(KEYS, "name"))
    clock = int(fake.client.hget(KEYS.meta, "clock") or 0) - 1  # the last tick was the put of the other key
    score = fake.run(inspection.score(KEYS.cold, "name"))  # under tinylfu, the other put has moved `name` to cold

    assert size is not None
    assert score is not None
    assert size == entry_format.pack_size(3, size_bytes)
    assert entry_format.unpack_size(size) == (3, size_bytes)
    frequency = 4 if policy is Policy.TINYLFU else 0
    assert score == entry_format.pack_score(clock, frequency)
    assert entry_format.unpack_score(score) == (clock, frequency)


@pytest.mark.parametrize("again", [False, True])
def test_cancelled_put_has_no_effect(fake: Fake, *, again: bool) -> None:
    deployed(fake, Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 0)))
    fake.run(commands.cancel_puts(KEYS, ("r",), FAR))
    newer = fake.run(
        commands.put(
            *(KEYS, "k", b"other 0  m\x02", "other"),
            until_ms=FAR, seen=0, again=False, ttl_ms=-1, tier=None, token="", origin="me", writer="me",
            report=NO_REPORT, tags=(),
        )
    )  # fmt: skip
    assert newer.outcome is PutResult.STORED
    before = fake.client.get(KEYS.entry_prefix + "k")

    assert put(fake, "k", seen=1, again=again).outcome is PutResult.IN_DOUBT

    assert fake.client.get(KEYS.entry_prefix + "k") == before


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
    version = fake.client.get(KEYS.entry("k")).split()[0]
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
