"""At the limit for names, new names replace names that were not used for a day, and no count is lost.

The scripts run on a simulated server with the test's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any
from unittest import mock

import pytest

from agentperf_redis import keys
from agentperf_redis.errors import CorruptState
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.accumulator import OK, Part
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.counters import Counters
from agentperf_redis.metrics.model import BETWEEN, FIRST, OTHER
from agentperf_redis.metrics.retention import Retention
from tests.support.fake import Fake

NAMESPACE = "limits"
SHARD = 3
NOON = 1_795_953_600.0
DAY_S = 86_400.0
LIMIT = 3


@cache
def stored_name(agent: str) -> str:
    """Return the stored name of a test's agent. All these names are in one shard."""
    if agent == OTHER:
        return agent
    return next(name for name in (f"{agent}.{n}" for n in count()) if keys.metrics_shard(name) == SHARD)


class World:
    """A simulated server with limits of three names. The tests use only the part of an agent's name before the dot."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.now = NOON
        self.seq = 0

    def flush(self, record: Callable[[Buffer], None]) -> None:
        clock = [0.0]
        buffer = Buffer(on_first=lambda: None, clock=lambda: clock[0])
        record(buffer)
        buffer.aggregate()
        with mock.patch("time.time", return_value=self.now):
            while batches := buffer.batches():
                for batch in batches:
                    self.fake.run(commands.flush(NAMESPACE, batch, now=0.0, retention=Retention()))
                    buffer.settled(batch, 0)

    def use(self, *agents: str, outcome: str = OK) -> None:
        def record(buffer: Buffer) -> None:
            for agent in agents:
                buffer.record(stored_name(agent), 0.5, outcome)

        self.flush(record)

    def agents(self) -> list[str]:
        return sorted(name.partition(".")[0] for name in self.fake.run(commands.agents(NAMESPACE, SHARD)))

    def total(self, agent: str, part: str = "") -> Counters:
        series = stored_name(agent) + part
        command = commands.read(NAMESPACE, SHARD, [series], window_ms=0, as_of_ms=-1, max_exact=0)
        with mock.patch("time.time", return_value=self.now):
            counters: Counters = self.fake.run(command).counter_sets[series]
        return counters

    def stored(self) -> set[str]:
        return set(self.fake.client.keys("*"))


@pytest.fixture
def world(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> World:
    for limit in ("MAX_AGENTS", "MAX_PARTS", "MAX_ERRORS"):
        monkeypatch.setattr(commands, limit, LIMIT)
    return World(fake)


def test_idle_agent_gives_way_to_a_new_one(world: World) -> None:
    world.use("a", "b", "c", outcome="err:KeyError")
    world.now += DAY_S / 2
    world.use("b", "c")
    world.use("early")
    assert world.agents() == [OTHER, "a", "b", "c"], "none is idle for a day"
    world.now += DAY_S / 2 + 1
    world.use("new")
    assert world.agents() == [OTHER, "b", "c", "new"]
    other = world.total(OTHER).counts
    assert (other["n"], other["err"], other["ok"], other["sum_us"]) == (2, 1, 1, 1_000_000), "early and a"
    assert world.total(OTHER).errors == {"KeyError": 1}
    assert sum(world.total(agent).counts["n"] for agent in world.agents()) == 7, "no count is lost"
    assert not keys_of("a", world)


def keys_of(agent: str, world: World) -> set[str]:
    """Return the stored keys of an agent and of its spans, except slices, which expire."""
    widths = [f":{width}:" for width in ("10s", "1m", "1h", "1d")]
    found = {key for key in world.stored() if f":{stored_name(agent)}" in key}
    return {key for key in found if not any(width in key for width in widths)}


def test_agents_of_a_flush_do_not_give_way_to_one_of_it(world: World) -> None:
    world.use("a", "b", "c")
    world.now += 2 * DAY_S
    world.use("new", "a", "b", "c")
    assert world.agents() == [OTHER, "a", "b", "c"]
    assert {agent: world.total(agent).counts["n"] for agent in world.agents()} == {OTHER: 1, "a": 2, "b": 2, "c": 2}


def test_many_new_agents_replace_many_idle_ones(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_AGENTS", 40)
    world.use(*(f"old-{number}" for number in range(40)))
    new = [f"new-{number}" for number in range(40)]
    for _ in range(3):  # one flush removes at most 16 names
        world.now += DAY_S + 1
        world.use(*new)
    assert set(world.agents()) == {OTHER, *new}
    assert sum(world.total(agent).counts["n"] for agent in world.agents()) == 160


def test_counts_of_the_spans_of_an_idle_agent_go_to_other(world: World) -> None:
    def spans(buffer: Buffer) -> None:
        buffer.record(stored_name("a"), 0.5, OK)
        buffer.record(Part(stored_name("a"), ("plan",)), 0.25, OK, 0.25)
        buffer.record(Part(stored_name("a"), ("plan", "step")), 0.125, "err:KeyError", 0.125)

    world.flush(spans)
    world.use("b", "c")
    world.now += DAY_S + 1
    world.use("new")
    assert not keys_of("a", world)
    assert world.fake.client.zrange(keys.metrics_parts(NAMESPACE, SHARD, OTHER), 0, -1) == [f"/{OTHER}"]
    other = world.total(OTHER, f"/{OTHER}")
    assert (other.counts["n"], other.counts["sum_us"], other.counts["self_us"]) == (2, 375_000, 375_000)
    assert other.errors == {"KeyError": 1}
    assert world.total(OTHER).counts["n"] == 1, "the executions of a"


def test_measures_of_an_idle_agent_go_to_the_measures_of_other(world: World) -> None:
    def measures(buffer: Buffer) -> None:
        for measure in (FIRST, BETWEEN):
            buffer.record(Part(stored_name("a"), (), measure), 0.5, OK)

    world.flush(measures)
    world.use("b", "c")
    world.now += DAY_S + 1
    world.use("new")
    assert not keys_of("a", world)
    assert [world.total(OTHER, f"#{measure}").counts["n"] for measure in (FIRST, BETWEEN)] == [1, 1]


def test_agents_with_many_spans_give_way_in_several_flushes(world: World) -> None:
    def spans(buffer: Buffer) -> None:
        for agent in "abc":
            for name in ("one", "two"):
                buffer.record(Part(stored_name(agent), (name,)), 0.25, OK, 0.25)

    world.flush(spans)
    world.now += DAY_S + 1
    world.use("d", "e", "f")
    assert len({"a", "b", "c"} & set(world.agents())) == 2, "two agents have more than three spans"
    assert world.total(OTHER).counts["n"] == 2
    world.use("e")
    world.use("f")
    assert world.agents() == [OTHER, "d", "e", "f"]
    assert world.total(OTHER, f"/{OTHER}").counts["n"] == 6


@pytest.mark.parametrize("names", [("new", "one"), ("one", "new")])
def test_spans_of_a_flush_counted_under_other_do_not_give_way(world: World, names: tuple[str, ...]) -> None:
    def span(*names: str) -> Callable[[Buffer], None]:
        def record(buffer: Buffer) -> None:
            for name in names:
                buffer.record(Part(stored_name("late"), (name,)), 0.25, OK, 0.25)

        return record

    world.use("a", "b", "c")
    world.flush(span("one", "two", "three"))
    world.now += DAY_S / 2
    world.use("a", "b", "c")
    world.now += DAY_S / 2 + 1
    world.flush(span("two", "three"))
    world.flush(span(*names))
    counted = {name: world.total(OTHER, f"/{name}").counts["n"] for name in ("one", "two", "three", OTHER)}
    assert counted == {"one": 2, "two": 2, "three": 2, OTHER: 1}


def test_idle_span_gives_way_to_a_new_one(world: World) -> None:
    def span(*names: str) -> Callable[[Buffer], None]:
        def record(buffer: Buffer) -> None:
            for name in names:
                buffer.record(Part(stored_name("a"), (name,)), 0.25, OK, 0.25)

        return record

    world.flush(span("one", "two", "three"))
    world.now += DAY_S + 1
    world.flush(span("two", "three"))
    world.flush(span("new"))
    parts = world.fake.run(commands.parts(NAMESPACE, stored_name("a")))
    assert sorted(parts) == [f"/{OTHER}", "/new", "/three", "/two"]
    assert world.total("a", f"/{OTHER}").counts["n"] == 1


@pytest.mark.parametrize("kind", ["err:", "mdl:"])
@pytest.mark.parametrize("durations", [1, 30])
def test_idle_error_or_model_gives_way_to_a_new_one(world: World, kind: str, durations: int) -> None:
    def use(*names: str) -> None:
        def record(buffer: Buffer) -> None:
            # If `durations` is 30, the slice of a day has many fields, and a flush on the next day closes the slice.
            # See `closed.lua`.
            for number in range(1, durations):
                buffer.record(stored_name("a"), 1.3**number, OK)
            for name in names:
                if kind == "err:":
                    buffer.record(stored_name("a"), 0.5, f"err:{name}")
                else:
                    buffer.add(stored_name("a"), {f"mdl:{name}:n": 1, f"mdl:{name}:tok_in": 10})

        world.flush(record)

    def counted() -> dict[str, int]:
        total = world.total("a")
        return dict(total.errors) if kind == "err:" else {name: use["n"] for name, use in total.models.items()}

    use("one", "two", "three")
    world.now += DAY_S
    use("two", "three", "four")
    assert counted() == {"one": 1, "two": 2, "three": 2, OTHER: 1}, "one was used yesterday"
    world.now += DAY_S
    use("two", "new", "one")
    assert counted() == {"two": 3, "three": 2, "one": 2, OTHER: 2}, "all were used within two days"
    world.now += 2 * DAY_S
    use("new", "two")
    found = counted()
    assert (found["new"], found["two"], len(found), sum(found.values())) == (1, 4, 4, 11)
    assert any(":slices:1d:" in key for key in world.stored()) == (durations == 30)
    if kind == "mdl:":
        models = world.total("a").models
        assert sum(use["tok_in"] for use in models.values()) == 110


def test_damaged_total_of_an_idle_agent_does_not_block_flushes(world: World) -> None:
    world.use("a", "b", "c")
    (total,) = (key for key in world.stored() if key.endswith(f":total:{stored_name('a')}"))
    world.fake.client.delete(total)
    world.fake.client.set(total, "planted")
    world.now += DAY_S + 1
    world.use("b", "c")
    world.use("new")
    assert world.agents() == [OTHER, "b", "c", "new"]
    assert total not in world.stored()


@pytest.mark.parametrize("planted", ["inf", "nan", "-5", "1e400", "some"])
def test_damaged_count_of_an_idle_agent_does_not_reach_other(world: World, planted: str) -> None:
    world.use("a", "b", "c")
    (total,) = (key for key in world.stored() if key.endswith(f":total:{stored_name('a')}"))
    world.fake.client.hset(total, "sum_us", planted)
    world.now += DAY_S + 1
    world.use("b", "c")
    world.use("new")
    world.use("further")
    assert world.agents() == [OTHER, "b", "c", "new"]
    other = world.total(OTHER).counts
    assert (other["n"], other["sum_us"]) == (2, 500_000), "the damaged sum is dropped"


@pytest.mark.parametrize("reply", [0, None, b"x", [0], [b"\xff"], [b"1|2us"]])
def test_unexpected_samples_are_corrupt_state(reply: Any) -> None:
    for command in (commands.recent(NAMESPACE, "a", 5), commands.slowest(NAMESPACE, "a", 5)):
        with pytest.raises(CorruptState):
            command.decode(reply)
