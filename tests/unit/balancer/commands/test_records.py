"""How the scripts read and write records, on a fake server: field order, fields of later versions, foreign records."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agentperf_redis.balancer import AgentInstance, LoadBalancingStrategy, Outcome, PoolSettings, commands, history
from agentperf_redis.balancer.commands import ANY, Choice, Granted, Pool, Rates
from agentperf_redis.command import Command
from agentperf_redis.errors import CorruptState, InvalidArgument
from tests.support import headers, records
from tests.support.fake import Fake
from tests.support.places import LUA

POOL = Pool.of("n", "t")
STATE = POOL.keys.state
NAMES = [
    *("load", "limit", "seq", "fence", "peak", "ewma_us", "ewma_at_ms"),
    *("served", "failed", "streak", "weight", "labels", "flags", "cap"),
]


@pytest.fixture
def fake() -> Any:
    found = Fake()
    yield found
    found.close()


def registered(fake: Fake, strategy: LoadBalancingStrategy = LoadBalancingStrategy.LEAST_LOADED, **facts: Any) -> None:
    instance = AgentInstance("p0", "t", max_capacity=5, **facts)
    fake.run(commands.register(POOL, instance, strategy, 0, settings=PoolSettings(eject_after=1)))


def acquired(fake: Fake, token: str = "@a") -> Granted:
    granted = fake.run(commands.acquire(POOL, token, 60_000, ANY))
    assert isinstance(granted, Granted)
    return granted


def every_command() -> dict[str, Command[Any]]:
    """Return one command for every script that reads the hash `state`. The keys are the names of the scripts."""
    instance = AgentInstance("p0", "t", max_capacity=5)
    return {
        "acquire": commands.acquire(POOL, "@new", 1000, ANY),
        "acquire_many": commands.acquire_many(POOL, ["@new", "@other"], 1000, ANY),
        "claim_checks": commands.claim_checks(POOL, 1000, 8),
        "configure": commands.configure(POOL, PoolSettings(), 0, 10),
        "cool_down": commands.cool_down(POOL, "p0", 1000, "cooled_down"),
        "delete": commands.delete(POOL),
        "extend": commands.extend(POOL, "@a", 1000),
        "heartbeat": commands.heartbeat(POOL, ["p0"], 1000),
        "layout": commands.divide(POOL, "set", 4),
        "leases": commands.leases_page(POOL, 0, 10),
        "register": commands.register(POOL, instance, None, 0),
        "release": commands.release(POOL, "@a", "p0"),
        "remove": commands.remove(POOL, "p0"),
        "repair": commands.repair(POOL, 0, 10),
        "report_checks": commands.report_checks(POOL, 1, [("p0", True)]),
        "sample": history.sample(POOL),
        "select": commands.select(POOL, ANY),
        "status": commands.status(POOL, 0, 10),
        "update": commands.update(POOL, "p0", max_capacity=7),
        "wait": commands.wait(POOL, "@new", ttl_ms=1, live_ms=1, boost_ms=0, require=frozenset(), position="-"),
        "watch": commands.watch(POOL, frozenset(), 1000),
    }


EVERY = sorted(every_command())


def test_commands_cover_every_script_that_reads_state() -> None:
    assert set(EVERY) == {name.partition("/")[2] for name in headers.scripts() if name.startswith("balancer/")} - {
        "renew"
    }


def everything(fake: Fake) -> dict[str, Any]:
    keys = sorted(fake.client.scan_iter("*"))
    return {key: fake.client.dump(key) for key in keys}


@pytest.mark.parametrize("strategy", list(LoadBalancingStrategy))
def test_written_records_have_every_field_in_one_order(fake: Fake, strategy: LoadBalancingStrategy) -> None:
    registered(fake, strategy, labels=frozenset({"gpu"}))
    assert list(records.fields(fake.client.hget(STATE, "p0"))) == NAMES
    acquired(fake)
    fake.run(commands.release(POOL, "@a", "p0", outcome=Outcome.OK, response_time=0.25))
    found = records.fields(fake.client.hget(STATE, "p0"))
    assert list(found) == NAMES
    assert (found["load"], found["peak"], found["served"], found["ewma_us"]) == ("0", "1", "1", "250000")
    assert (found["labels"], found["flags"], found["cap"]) == ("gpu", "-", "5")


@pytest.mark.parametrize("outcome", [Outcome.OK, Outcome.ERROR])
def test_fields_of_a_later_version_are_kept(fake: Fake, outcome: Outcome) -> None:
    registered(fake)
    fake.run(commands.update(POOL, "p0", requests_per_minute=6000.0))
    for name in ("p0", "+p0"):
        fake.client.hset(STATE, name, fake.client.hget(STATE, name) + " zone=eu shard=7")
    acquired(fake)
    fake.run(commands.release(POOL, "@a", "p0", outcome=outcome))
    fake.run(commands.update(POOL, "p0", requests_per_minute=float("inf")))
    acquired(fake, "@b")
    fake.run(commands.release(POOL, "@b", "p0", outcome=outcome))
    assert fake.client.hget(STATE, "p0").endswith(" cap=5 zone=eu shard=7")
    assert fake.client.hget(STATE, "+p0").endswith("zone=eu shard=7")
    page = fake.run(commands.status(POOL, 0, 10))
    assert page.instances[0].served + page.instances[0].failed == 2


@pytest.mark.parametrize("strategy", list(LoadBalancingStrategy))
def test_fields_are_read_in_any_order(fake: Fake, strategy: LoadBalancingStrategy) -> None:
    def reverse_fields() -> None:
        words = fake.client.hget(STATE, "p0").split(" ")
        fake.client.hset(STATE, "p0", " ".join(reversed(words)))

    registered(fake, strategy)
    reverse_fields()
    assert fake.run(commands.select(POOL, ANY)).id == "p0"
    acquired(fake)
    reverse_fields()
    assert fake.run(commands.release(POOL, "@a", "p0", outcome=Outcome.OK)) is True
    found = records.fields(fake.client.hget(STATE, "p0"))
    assert list(found) == NAMES
    assert (found["load"], found["served"], found["seq"]) == ("0", "1", "1")


def test_extra_record_leaves_out_zeros(fake: Fake) -> None:
    registered(fake)
    assert fake.client.hget(STATE, "+p0") is None
    fake.run(commands.update(POOL, "p0", requests_per_minute=90.5))
    assert fake.client.hget(STATE, "+p0") == "rpm=90.5"
    fake.run(commands.update(POOL, "p0", requests_per_minute=float("inf")))
    assert fake.client.hget(STATE, "+p0") == "-"
    assert fake.run(commands.status(POOL, 0, 10)).instances[0].requests_per_minute == float("inf")


def test_extra_record_survives_reading_and_writing(fake: Fake) -> None:
    fields = {
        "ejections": "2",
        "ejected_until_ms": "1795380358694",
        "probe_since_us": "1795380358694123",
        "leases_before": "1",
        "adaptive_limit_milli": "2333.33333333333",
        "limit_cut_us": "1795380358694124",
        "warm_tenths": "3",
        "checks": "-2",
        "checked_ms": "1795380358695",
        "rpm": "60",
        "tpm": "1.5",
        "rpm_arrival_us": "1795380358694125",
        "tpm_arrival_us": "1795380358694126",
        "heartbeat_ms": "30000",
    }
    registered(fake)
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    fake.client.hset(STATE, "+p0", text)
    fake.run(commands.update(POOL, "p0", weight=2.0))
    assert fake.client.hget(STATE, "+p0") == text


def test_flags_are_sorted_words(fake: Fake) -> None:
    registered(fake)
    rates = Rates(requests_per_minute=60)
    fake.run(commands.register(POOL, AgentInstance("p0", "t", is_healthy=False), None, 0, rates=rates))
    fake.run(commands.update(POOL, "p0", on="draining"))
    assert records.fields(fake.client.hget(STATE, "p0"))["flags"] == "draining,metered,unhealthy"
    fake.run(commands.update(POOL, "p0", off="draining,unhealthy"))
    assert records.flags(fake.client.hget(STATE, "p0")) == {"metered"}


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"delete"}))  # a damaged pool can be deleted
def test_unknown_stored_strategy_is_corrupt_state(fake: Fake, name: str) -> None:
    registered(fake)
    acquired(fake)
    fake.client.hset(STATE, "#pool", "schema=2 strategy=fastest")
    before = everything(fake)
    with pytest.raises(CorruptState, match="#pool"):
        fake.run(every_command()[name])
    assert everything(fake) == before


@pytest.mark.parametrize("script", ["acquire", "acquire_many", "register", "select"])
@pytest.mark.parametrize("is_registered", [True, False])
def test_unknown_wanted_strategy_is_refused(fake: Fake, script: str, is_registered: bool) -> None:
    if is_registered:
        registered(fake)
    command = every_command()[script]
    assert isinstance(command.args, dict)
    args = {**command.args, "wanted": "fastest"}
    before = everything(fake)
    with pytest.raises(InvalidArgument, match="fastest"):
        fake.run(Command(command.script, command.keys, args, command.decode))
    assert everything(fake) == before


NEEDS_NO_RECORD = {"leases", "sample", "wait", "extend", "layout", "watch", "repair", "delete"}
"""Scripts that do not fail on a foreign record. Six read no instance records; repair and delete skip foreign ones."""


@pytest.mark.parametrize("name", sorted(set(EVERY) - NEEDS_NO_RECORD))
@pytest.mark.parametrize("wrong", ["poison", "load=1 limit=5", "1 5 1 1 1 1 - - 5 0 0 0 0 0"])
def test_foreign_record_is_corrupt_state_in_every_script(fake: Fake, name: str, wrong: str) -> None:
    registered(fake)
    acquired(fake)
    fake.client.hset(STATE, "p0", wrong)
    before = {key: value for key, value in everything(fake).items() if not key.endswith(":checks")}
    with pytest.raises(CorruptState):
        fake.run(every_command()[name])
    after = {key: value for key, value in everything(fake).items() if not key.endswith(":checks")}
    assert fake.client.hget(STATE, "p0") == wrong
    if name not in ("status", "select"):  # these two process due timers before they read the record
        assert after == before


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"leases", "repair", "claim_checks", "extend", "delete"}))
def test_foreign_counter_is_corrupt_state_in_every_script(fake: Fake, name: str) -> None:
    registered(fake)
    acquired(fake)
    fake.client.hset(STATE, "#load", "many")
    before = everything(fake)
    with pytest.raises(CorruptState, match="#load"):
        fake.run(every_command()[name])
    assert everything(fake) == before


def test_waiter_with_a_foreign_record_is_corrupt_state(fake: Fake) -> None:
    registered(fake)
    fake.client.hset(STATE, "@new", "W 5 1000 - 0")
    before = everything(fake)
    with pytest.raises(CorruptState, match="@new"):
        fake.run(every_command()["wait"])
    assert everything(fake) == before


def test_scores_pack_load_and_pick(fake: Fake) -> None:
    for number in range(3):
        fake.run(commands.register(POOL, AgentInstance(f"i{number}", "t", max_capacity=3), None, 0))
    for number in range(5):
        acquired(fake, f"@{number}")
    for name, score in fake.client.zrange(POOL.keys.ready, 0, -1, withscores=True):
        found = records.fields(fake.client.hget(STATE, name))
        load, limit, seq = (int(found[each]) for each in ("load", "limit", "seq"))
        assert score == records.load_score(load, limit, seq)
        assert records.load_and_pick(score) == (load * 8192 // limit / 8192, seq)


def test_strategies_are_one_list_in_lua_and_python() -> None:
    text = (LUA / "balancer" / "includes" / "strategies.lua").read_text()
    rows = re.findall(r"pool == 'schema=2 strategy=(\w+)' then\n    return .* '(\w+)'\n", text)
    assert sorted(rows) == sorted((each.value, each.value) for each in LoadBalancingStrategy)
    for file in (LUA / "balancer").rglob("*.lua"):
        if file.name != "strategies.lua":
            code = re.sub(r"--[^\n]*", "", file.read_text())
            named = [each.value for each in LoadBalancingStrategy if re.search(rf"['=]{each.value}'", code)]
            assert named == [], f"{file.name} compares the name of a strategy"


def test_choice_of_another_strategy_is_named(fake: Fake) -> None:
    registered(fake)
    with pytest.raises(InvalidArgument, match="least_loaded"):
        fake.run(commands.acquire(POOL, "@x", 1000, Choice(LoadBalancingStrategy.RANDOM)))
