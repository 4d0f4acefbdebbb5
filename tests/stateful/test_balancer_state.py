"""The same operations on the scripts and on a plain model; all of the pool's state is compared after every one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentperf_redis.balancer import AgentInstance, LoadBalancingStrategy, Outcome, commands
from agentperf_redis.balancer.commands import Choice, Granted, Pool, Refused, Spent
from tests.fake import Fake

IDS = ("a", "b", "c", "d")
LABELS = ("gpu", "fr")
DAY_MS = 86_400_000


@dataclass
class Instance:
    capacity: int
    weight: float
    labels: frozenset[str]
    flags: set[str] = field(default_factory=set)

    @property
    def limit(self) -> int:
        return 0 if self.flags else self.capacity


class PoolMachine(RuleBasedStateMachine):
    """Time does not pass by itself: leases live for a day, and `expire` sets their end into the past."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = Fake()
        self.pool = Pool.of("n", "t")
        self.instances: dict[str, Instance] = {}
        self.leases: dict[str, str] = {}
        self.released: dict[str, str] = {}
        self.tombs: dict[str, str] = {}
        self.fences: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.tokens = 0

    def teardown(self) -> None:
        self.fake.close()

    @initialize(strategy=st.sampled_from(list(LoadBalancingStrategy)), seed=st.integers(0, 2**32))
    def begin(self, strategy: LoadBalancingStrategy, seed: int) -> None:
        self.strategy = strategy
        random.seed(seed)
        self.register("a", 2, 1.0, frozenset(), True)

    def load(self, name: str) -> int:
        return sum(holder == name for holder in self.leases.values())

    def registered(self) -> dict[str, Instance]:
        return {name: each for name, each in self.instances.items() if "r" not in each.flags}

    def forget_removed(self) -> None:
        for name in [name for name, each in self.instances.items() if "r" in each.flags and not self.load(name)]:
            del self.instances[name]
            self.peaks.pop(name, None)

    @rule(
        name=st.sampled_from(IDS),
        capacity=st.integers(1, 4),
        weight=st.sampled_from([0.0, 0.5, 1.0, 100.0]),
        labels=st.frozensets(st.sampled_from(LABELS)),
        healthy=st.booleans(),
    )
    def register(self, name: str, capacity: int, weight: float, labels: frozenset[str], healthy: bool) -> None:
        instance = AgentInstance(name, "t", 0, capacity, weight, healthy, labels=labels)
        assert self.fake.run(commands.register(self.pool, instance, self.strategy, 0)) is self.strategy
        known = self.instances.setdefault(name, Instance(capacity, weight, labels))
        known.capacity, known.weight, known.labels = capacity, weight, labels
        known.flags.discard("r")
        if not healthy:
            known.flags.add("u")

    @rule(name=st.sampled_from(IDS))
    def remove(self, name: str) -> None:
        assert self.fake.run(commands.remove(self.pool, name)) is (name in self.registered())
        if name in self.registered():
            self.instances[name].flags = {"r"}
            self.forget_removed()

    @rule(name=st.sampled_from(IDS), on=st.sampled_from(["", "u", "d"]), off=st.sampled_from(["", "u", "d"]))
    def mark(self, name: str, on: str, off: str) -> None:
        load = self.fake.run(commands.update(self.pool, name, on=on, off=off))
        if name not in self.registered():
            assert load is None
            return
        assert load == self.load(name)
        self.instances[name].flags = (self.instances[name].flags | set(on)) - set(off)

    @rule(name=st.sampled_from(IDS), capacity=st.integers(1, 4), labels=st.frozensets(st.sampled_from(LABELS)))
    def change(self, name: str, capacity: int, labels: frozenset[str]) -> None:
        self.fake.run(commands.update(self.pool, name, max_capacity=capacity, labels=labels))
        if name in self.registered():
            self.instances[name].capacity, self.instances[name].labels = capacity, labels

    @rule(require=st.frozensets(st.sampled_from(LABELS)), affinity=st.sampled_from([None, "x", "y"]))
    def acquire(self, require: frozenset[str], affinity: str | None) -> None:
        self.tokens += 1
        token = f"@{self.tokens}"
        choice = Choice(self.strategy, require, affinity)
        fitting = {
            name for name, each in self.instances.items() if self.load(name) < each.limit and require <= each.labels
        }
        answer = self.fake.run(commands.acquire(self.pool, token, DAY_MS, choice))
        if isinstance(answer, Refused):
            assert not fitting
            assert answer.registered == len(self.registered())
            return
        assert isinstance(answer, Granted)
        name = answer.instance.id
        assert name in fitting
        assert answer.fence > self.fences.get(name, 0)
        self.fences[name] = answer.fence
        self.leases[token] = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.load(name))
        if self.strategy is LoadBalancingStrategy.LEAST_LOADED and not require:
            before = {each: (self.load(each) - (each == name)) / self.instances[each].limit for each in fitting}
            assert before[name] == min(before.values())

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def acquire_again(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.leases)))
        answer = self.fake.run(commands.acquire(self.pool, token, DAY_MS, Choice(self.strategy)))
        assert isinstance(answer, Granted)
        assert answer.instance.id == self.leases[token]

    @precondition(lambda self: self.tombs)
    @rule(data=st.data())
    def acquire_too_late(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.tombs)))
        assert self.fake.run(commands.acquire(self.pool, token, DAY_MS, Choice(self.strategy))) == Spent(
            self.tombs[token]
        )
        assert self.fake.run(commands.release(self.pool, token)) is False

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(), outcome=st.sampled_from(Outcome), bury=st.booleans(), seconds=st.sampled_from([None, 0.0, 0.5])
    )
    def release(self, data: st.DataObject, outcome: Outcome, bury: bool, seconds: float | None) -> None:
        token = data.draw(st.sampled_from(sorted(self.leases)))
        name = data.draw(st.sampled_from([self.leases[token], None, "a"]))
        command = commands.release(
            self.pool, token, name, outcome=outcome, response_time=seconds, bury_ms=DAY_MS if bury else 0
        )
        assert self.fake.run(command) is True
        assert self.fake.run(command) is False
        del self.leases[token]
        # Without a tombstone the second release is of a token nobody knows; with one, of a spent one.
        if bury:
            self.tombs[token] = "r"
        self.forget_removed()

    @rule()
    def give_up(self) -> None:
        self.tokens += 1
        token = f"@{self.tokens}"
        assert self.fake.run(commands.release(self.pool, token, bury_ms=DAY_MS)) is False
        self.tombs[token] = "c"

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.leases)))
        self.fake.client.zadd(self.pool.keys.due, {token: 1})
        self.fake.client.hset(self.pool.keys.state, "#next", 1)
        assert self.fake.run(commands.renew(self.pool, [token], DAY_MS)) == {token}
        page = self.fake.run(commands.status(self.pool, 0, 100))
        assert page is not None
        assert page.overdue == 0
        del self.leases[token]
        self.tombs[token] = "e"
        self.forget_removed()

    @invariant()
    def state_is_the_models(self) -> None:
        state: dict[str, str] = self.fake.client.hgetall(self.pool.keys.state)
        records = {name: record.split(" ") for name, record in state.items() if name[0] not in "@#"}
        assert set(records) == set(self.instances)
        for name, record in records.items():
            known = self.instances[name]
            assert int(record[0]) == self.load(name)
            assert int(record[1]) == known.limit
            assert float(record[5]) == known.weight
            assert set(record[7]) - {"-"} == known.flags
            assert int(record[8]) == known.capacity
            assert int(record[4]) == self.peaks.get(name, 0)
        tokens = {name: record.split(" ") for name, record in state.items() if name[0] == "@"}
        assert {token: record[1] for token, record in tokens.items() if record[0] == "L"} == self.leases
        assert {token: record[1] for token, record in tokens.items() if record[0] == "X"} == self.tombs
        assert int(state.get("#load", 0)) == len(self.leases)
        assert int(state.get("#cap", 0)) == sum(each.limit for each in self.instances.values())

    @invariant()
    def indexes_follow_from_records(self) -> None:
        ready = {name for name, each in self.instances.items() if self.load(name) < each.limit}
        indexes: dict[str, set[str]] = {self.pool.keys.ready: ready}
        for label in LABELS:
            indexes[self.pool.keys.ready_with(label)] = {name for name in ready if label in self.instances[name].labels}
        state: dict[str, str] = self.fake.client.hgetall(self.pool.keys.state)
        for key, expected in indexes.items():
            scores: dict[str, float] = dict(self.fake.client.zrange(key, 0, -1, withscores=True))
            assert set(scores) == expected
            for name, score in scores.items():
                assert score == self.score(state[name].split(" "))
        due: dict[str, float] = dict(self.fake.client.zrange(self.pool.keys.due, 0, -1, withscores=True))
        assert set(due) == set(self.leases) | {"X" + token for token in self.tombs}
        if due and "#next" in state:
            assert int(state["#next"]) <= min(due.values())
        ids: Any = self.fake.client.zrange(self.pool.keys.ids, 0, -1)
        assert set(ids) == set(self.registered())

    def score(self, record: list[str]) -> float:
        load, limit, seq = (int(each) for each in record[:3])
        if self.strategy is LoadBalancingStrategy.ROUND_ROBIN:
            return seq
        if self.strategy is LoadBalancingStrategy.WEIGHTED:
            return int(float(record[5]) * 1e9 * (limit - load) / limit)
        if self.strategy in (LoadBalancingStrategy.RANDOM, LoadBalancingStrategy.PEAK_EWMA):
            return 0
        return load * 8192 // limit * 2**40 + seq


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
