"""Runs the same operations on the scripts and on a plain model, and compares the whole state after each operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agentperf_redis import random_numbers
from agentperf_redis.balancer import AgentInstance, LoadBalancingStrategy, Outcome, PoolSettings, commands
from agentperf_redis.balancer.commands import Choice, Granted, Pool, Queued, Refused, Spent
from tests.support import records
from tests.support.examples import examples
from tests.support.fake import Fake

IDS = ("a", "b", "c", "d")
LABELS = ("gpu", "fr")
BY_HAND = ("", "unhealthy", "draining")
DAY_MS = 86_400_000
DEPTH = 132
"""Number of waiters that the scripts examine to find one for a free instance (`dispatch` in maintenance.lua)."""


@dataclass
class Instance:
    capacity: int
    weight: float
    labels: frozenset[str]
    flags: set[str] = field(default_factory=set)
    """The flags set by hand, as the model expects them."""
    health: set[str] = field(default_factory=set)
    """The flags set by the scripts, read after the last operation."""
    limit: int = 0
    """Maximum number of leases of the instance, computed from its flags."""


JUMPY = PoolSettings(
    eject_after=1,
    base_ejection_time=86_400.0,
    max_ejection_time=86_400.0,
    max_ejection_share=1.0,
    slow_after=0.25,
    adaptive=True,
    slow_start=86_400.0,
    rate_burst=0,
    unhealthy_threshold=1,
    healthy_threshold=1,
)
"""With these settings, the first bad outcome ejects. Ejections and warm-ups last a day, longer than any test."""
DISABLED = {"heartbeat_missed", "unhealthy", "draining", "removed"}
UNHEALTHY = {"ejected", "down", "half_open"}
BLOCKED = {"rate_limited", "resting"}
HEALTH = UNHEALTHY | BLOCKED | {"adaptive", "warming", "metered"}
TIMERS = {"ejected": "E:", "warming": "V:", "rate_limited": "R:", "resting": "C:"}


def limit_of(capacity: int, flags: set[str], extra: str | None, panic: bool) -> int:
    """Return the maximum number of leases of an instance, as pool.lua defines `limit`."""
    if flags & (DISABLED | BLOCKED) or (flags & {"ejected", "down"} and not panic):
        return 0
    bounds = [capacity]
    if "adaptive" in flags:
        bounds.append(max(1, int(records.number(extra, "adaptive_limit_milli") / 1000)))
    if "warming" in flags:
        bounds.append(max(1, int(capacity * records.number(extra, "warm_tenths") / 10)))
    if "half_open" in flags and not panic:
        bounds.append(int(records.number(extra, "leases_before")) + 1)
    return min(bounds)


class PoolMachine(RuleBasedStateMachine):
    """Leases, grants and waiters never expire by time, since the clock advances only 1 ms per call. Rules end them."""

    settings = PoolSettings(eject_after=None)

    def __init__(self) -> None:
        super().__init__()
        self.fake = Fake(ms_per_script=1)
        self.pool = Pool.of("n", "t")
        self.instances: dict[str, Instance] = {}
        self.leases: dict[str, str] = {}
        self.waiting: dict[str, frozenset[str]] = {}
        self.granted: set[str] = set()
        self.positions: dict[str, str] = {}
        self.queued_before: set[str] = set()
        self.tombstones: dict[str, str] = {}
        self.fences: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.tokens = 0

    def teardown(self) -> None:
        self.fake.close()

    @initialize(
        strategy=st.sampled_from(list(LoadBalancingStrategy)),
        seed=st.integers(0, 2**32),
    )
    def begin(self, strategy: LoadBalancingStrategy, seed: int) -> None:
        # Under RANDOM and PEAK_EWMA, the server's time decides which instance a waiter gets. With JUMPY settings, too
        # much of the state depends on this decision, so LEAST_LOADED replaces these two strategies.
        timed = {LoadBalancingStrategy.RANDOM, LoadBalancingStrategy.PEAK_EWMA}
        jumpy = self.settings is JUMPY
        self.strategy = LoadBalancingStrategy.LEAST_LOADED if jumpy and strategy in timed else strategy
        self.checked = 0
        random_numbers.seed(seed)
        self.register("a", 2, 1.0, frozenset(), True, None)
        self.fake.client.zadd(self.pool.keys.ids, {"a": 1})  # registered long ago, so that later instances count as new

    def load(self, name: str) -> int:
        return sum(holder == name for holder in self.leases.values())

    def registered(self) -> dict[str, Instance]:
        return {name: each for name, each in self.instances.items() if "removed" not in each.flags}

    def fetched(self) -> list[str]:
        return sorted(set(self.leases) - self.granted)

    def forget_removed(self) -> None:
        for name in [name for name, each in self.instances.items() if "removed" in each.flags and not self.load(name)]:
            del self.instances[name]
            self.peaks.pop(name, None)

    @rule(
        name=st.sampled_from(IDS),
        capacity=st.integers(1, 4),
        weight=st.sampled_from([0.0, 0.5, 1.0, 100.0]),
        labels=st.frozensets(st.sampled_from(LABELS)),
        healthy=st.booleans(),
        rate=st.sampled_from([None, 0.001]),
    )
    def register(
        self,
        name: str,
        capacity: int,
        weight: float,
        labels: frozenset[str],
        healthy: bool,
        rate: float | None,
    ) -> None:
        instance = AgentInstance(name, "t", 0, capacity, weight, healthy, labels=labels)
        rates = commands.UNLIMITED if rate is None or self.settings is not JUMPY else commands.Rates(rate)
        command = commands.register(self.pool, instance, self.strategy, 0, rates=rates, settings=self.settings)
        assert self.fake.run(command).strategy is self.strategy
        known = self.instances.setdefault(name, Instance(capacity, weight, labels))
        known.capacity, known.weight, known.labels = capacity, weight, labels
        known.flags.discard("removed")
        if not healthy:
            known.flags.add("unhealthy")

    @rule(name=st.sampled_from(IDS))
    def remove(self, name: str) -> None:
        done = self.fake.run(commands.remove(self.pool, name))
        assert (done is not None) is (name in self.registered())
        if done is not None:
            self.instances[name].flags = {"removed"}
            self.forget_removed()
            assert done.is_empty is not bool(self.registered() or self.leases or self.waiting)

    @rule(chance=st.integers(0, 19))
    def delete_pool(self, chance: int) -> None:
        if chance:
            return
        assert self.fake.run(commands.delete(self.pool)) is True
        assert self.fake.client.keys() == [self.pool.keys.state]
        assert self.fake.run(commands.delete(self.pool)) is False
        for known in (self.instances, self.leases, self.waiting, self.tombstones, self.peaks, self.positions):
            known.clear()
        self.granted.clear()
        self.queued_before.clear()
        self.register("a", 2, 1.0, frozenset(), True, None)
        self.fake.client.zadd(self.pool.keys.ids, {"a": 1})

    @rule(name=st.sampled_from(IDS), on=st.sampled_from(BY_HAND), off=st.sampled_from(BY_HAND))
    def mark(self, name: str, on: str, off: str) -> None:
        load = self.fake.run(commands.update(self.pool, name, on=on, off=off))
        if name not in self.registered():
            assert load is None
            return
        assert load == self.load(name)
        self.instances[name].flags = (self.instances[name].flags | {on}) - {off, ""}

    @rule(name=st.sampled_from(IDS), capacity=st.integers(1, 4), labels=st.frozensets(st.sampled_from(LABELS)))
    def change(self, name: str, capacity: int, labels: frozenset[str]) -> None:
        self.fake.run(commands.update(self.pool, name, max_capacity=capacity, labels=labels))
        if name in self.registered():
            self.instances[name].capacity, self.instances[name].labels = capacity, labels

    @precondition(lambda self: self.settings is JUMPY)
    @rule(names=st.lists(st.sampled_from(IDS), min_size=1, unique=True), good=st.booleans())
    def check(self, names: list[str], good: bool) -> None:
        self.checked += 1
        command = commands.report_checks(self.pool, self.checked, [(name, good) for name in names])
        unknown = self.fake.run(command)
        assert set(unknown) == set(names) - set(self.registered())
        assert self.fake.run(command) == unknown  # a repeat has no effect
        self.refresh()
        for name in set(names) & set(self.registered()):
            assert ("down" in self.instances[name].health) is not good

    @precondition(lambda self: self.settings is JUMPY)
    @rule(name=st.sampled_from(IDS), flag=st.sampled_from(["ejected"] * 3 + ["warming", "rate_limited"]))
    def timer_fires(self, name: str, flag: str) -> None:
        """Fire one timer: an ejection ends, a step of a warm-up ends, or a rate limit recovers."""
        if name not in self.registered() or flag not in self.instances[name].health:
            return
        state = self.pool.keys.state
        if flag == "rate_limited":
            records.change(self.fake.client, state, "+" + name, rpm_arrival_us=0)
        self.fake.client.zadd(self.pool.keys.due, {TIMERS[flag] + name: 1})
        self.fake.client.hset(state, "#next", 1)
        self.fake.run(commands.status(self.pool, 0, 100))
        self.refresh()
        # If a waiter has just got a lease of the instance, the instance is rate-limited again.
        if flag == "ejected" or (flag == "rate_limited" and not self.waiting):
            assert flag not in self.instances[name].health
        if flag == "ejected":
            assert "half_open" in self.instances[name].health

    @rule(name=st.sampled_from(IDS), rest_ms=st.sampled_from([1, DAY_MS]))
    def cool_down(self, name: str, rest_ms: int) -> None:
        until_ms = self.rest_until_ms(name)
        assert self.fake.run(commands.cool_down(self.pool, name, rest_ms, "cooled_down")) is (name in self.registered())
        assert self.rest_until_ms(name) >= until_ms  # a rest is never shortened
        if name in self.registered():
            self.fake.client.zadd(self.pool.keys.due, {"C:" + name: 2 * 10**15})  # only `rest_ends` ends this rest
            self.refresh()
            assert "resting" in self.instances[name].health

    def rest_until_ms(self, name: str) -> float:
        return records.number(self.fake.client.hget(self.pool.keys.state, "+" + name), "rest_until_ms")

    @rule(name=st.sampled_from(IDS), by_hand=st.booleans())
    def rest_ends(self, name: str, by_hand: bool) -> None:
        if name not in self.registered() or "resting" not in self.instances[name].health:
            return
        if by_hand:
            self.fake.run(commands.update(self.pool, name, off="resting"))
        else:
            self.fake.client.zadd(self.pool.keys.due, {"C:" + name: 1})
            self.fake.client.hset(self.pool.keys.state, "#next", 1)
            self.fake.run(commands.status(self.pool, 0, 100))
        self.refresh()
        assert "resting" not in self.instances[name].health

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
        name = answer.facts[0]
        assert name in fitting
        assert "resting" not in self.instances[name].health
        assert answer.fence > self.fences.get(name, 0)
        self.fences[name] = answer.fence
        self.leases[token] = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.load(name))
        if self.strategy is LoadBalancingStrategy.LEAST_LOADED and not require:
            before = {each: (self.load(each) - (each == name)) / self.instances[each].limit for each in fitting}
            assert before[name] == min(before.values())

    @rule(
        count=st.integers(1, 6),
        whole=st.booleans(),
        late=st.booleans(),
        require=st.frozensets(st.sampled_from(LABELS)),
    )
    def acquire_many(self, count: int, whole: bool, late: bool, require: frozenset[str]) -> None:
        tokens = tuple(f"@{self.tokens + number}" for number in range(1, count + 1))
        self.tokens += count
        free = 0
        for name, each in self.instances.items():
            if require <= each.labels and self.load(name) < each.limit:
                # In these tests, a metered instance has such a low rate that one lease makes it rate-limited.
                free += 1 if "metered" in each.health else each.limit - self.load(name)
        command = commands.acquire_many(self.pool, tokens, DAY_MS, Choice(self.strategy, require), whole=whole)
        if late:
            assert isinstance(command.args, Mapping)
            command = replace(command, args={**command.args, "late": 1})
        answer = self.fake.run(command)
        granted: dict[str, Granted] = answer if isinstance(answer, dict) else {}
        assert len(granted) == (min(free, count) if free >= count or not whole else 0)
        for token, grant in granted.items():
            name = grant.facts[0]
            assert grant.fence > self.fences.get(name, 0)
            self.fences[name] = grant.fence
            self.leases[token] = name
            self.peaks[name] = max(self.peaks.get(name, 0), self.load(name))
        if late:
            self.tombstones.update(dict.fromkeys(set(tokens) - set(granted), "refused"))
            # If a lease was acquired with late 1, or was fetched from the queue, its release leaves a tombstone.
            self.queued_before.update(granted)
        if granted:
            again = self.fake.run(command)
            assert {token: each.facts[0] for token, each in again.items()} == {t: self.leases[t] for t in granted}

    @precondition(lambda self: self.fetched())
    @rule(data=st.data())
    def acquire_again(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.fetched()))
        answer = self.fake.run(commands.acquire(self.pool, token, DAY_MS, Choice(self.strategy)))
        assert isinstance(answer, Granted)
        assert answer.facts[0] == self.leases[token]

    @precondition(lambda self: self.tombstones)
    @rule(data=st.data())
    def acquire_too_late(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.tombstones)))
        assert self.fake.run(commands.acquire(self.pool, token, DAY_MS, Choice(self.strategy))) == Spent(
            self.tombstones[token]
        )
        assert self.fake.run(commands.release(self.pool, token)) is False

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(Outcome),
        tombstone=st.booleans(),
        seconds=st.sampled_from([None, 0.0, 0.5]),
    )
    def release(self, data: st.DataObject, outcome: Outcome, tombstone: bool, seconds: float | None) -> None:
        token = data.draw(st.sampled_from(sorted(self.leases)))
        name = data.draw(st.sampled_from([self.leases[token], None, "a"]))
        self.finish(token, name, outcome, tombstone, seconds)

    @precondition(lambda self: self.settings is JUMPY)
    @rule(outcome=st.sampled_from(Outcome))
    def work(self, outcome: Outcome) -> None:
        """Acquire a lease and release it immediately; this changes many fields of an instance."""
        self.acquire(frozenset(), None)
        token = f"@{self.tokens}"
        if token in self.leases:
            self.refresh()
            self.finish(token, self.leases[token], outcome, False, None)

    def finish(self, token: str, name: str | None, outcome: Outcome, tombstone: bool, seconds: float | None) -> None:
        fit_before = {
            n for n, each in self.instances.items() if not each.flags & DISABLED and not each.health & UNHEALTHY
        }
        ejected_before = {n for n, each in self.instances.items() if "ejected" in each.health}
        command = commands.release(
            self.pool,
            token,
            name,
            outcome=outcome,
            response_time=seconds,
            tombstone_ms=DAY_MS if tombstone else 0,
            rest_ms=0 if tombstone else DAY_MS,
        )
        until_ms = self.rest_until_ms(self.leases[token])
        streak = self.streak(self.leases[token])
        assert self.fake.run(command) is True
        assert self.fake.run(command) is False
        self.refresh()
        if outcome is Outcome.RATE_LIMITED and self.leases[token] in self.registered():
            assert tombstone or "resting" in self.instances[self.leases[token]].health
            assert self.rest_until_ms(self.leases[token]) >= until_ms
            assert self.streak(self.leases[token]) == streak  # RATE_LIMITED is neither a success nor a failure
        for ejected in {n for n, each in self.instances.items() if "ejected" in each.health} - ejected_before:
            assert outcome is not Outcome.RATE_LIMITED
            assert outcome not in (Outcome.OK, Outcome.NEUTRAL) or seconds
            # An ejection leaves at least one healthy instance. A half-open instance is not in `fit_before`, but it can
            # be ejected, too.
            assert len(fit_before - {ejected}) >= 1
        del self.leases[token]
        fetched_from_queue = token in self.queued_before and token not in self.granted
        self.granted.discard(token)
        # The token is spent only if its release left a tombstone.
        if tombstone or fetched_from_queue:
            self.tombstones[token] = "released"
        self.forget_removed()

    def streak(self, name: str) -> float:
        return records.number(self.fake.client.hget(self.pool.keys.state, name), "streak")

    def poll_queue(self, token: str, labels: frozenset[str]) -> Granted | Queued | Spent:
        self.queued_before.add(token)
        position = self.positions.get(token, "-")
        answer: Granted | Queued | Spent = self.fake.run(
            commands.wait(
                self.pool, token, ttl_ms=DAY_MS, live_ms=DAY_MS, boost_ms=0, require=labels, position=position
            )
        )
        if isinstance(answer, Queued):
            self.positions[token] = answer.position
        return answer

    @precondition(lambda self: len(self.waiting) < DEPTH - 3)
    @rule(requires=st.lists(st.frozensets(st.sampled_from(LABELS), max_size=1), min_size=1, max_size=3))
    def wait(self, requires: list[frozenset[str]]) -> None:
        for require in requires:
            self.wait_for(require)

    def wait_for(self, require: frozenset[str]) -> None:
        self.tokens += 1
        token = f"@{self.tokens}"
        self.refresh()
        fits = any(self.load(name) < each.limit and require <= each.labels for name, each in self.instances.items())
        self.waiting[token] = require
        answer = self.poll_queue(token, require)
        assert isinstance(answer, Granted if fits else Queued)
        self.check_grants()
        if isinstance(answer, Granted):
            self.granted.discard(token)
            assert self.leases[token] == answer.facts[0]

    @precondition(lambda self: self.waiting or self.granted)
    @rule(data=st.data())
    def wait_again(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.waiting) + sorted(self.granted)))
        answer = self.poll_queue(token, self.waiting.get(token, frozenset()))
        if token in self.granted:
            self.granted.discard(token)
            assert isinstance(answer, Granted)
            assert answer.facts[0] == self.leases[token]
        else:
            assert isinstance(answer, Queued)
            assert answer.ahead == sorted(self.waiting, key=lambda each: int(self.positions[each])).index(token)

    @rule(require=st.frozensets(st.sampled_from(LABELS)))
    def watch(self, require: frozenset[str]) -> None:
        """Watch this shard for a waiter of another shard. An instance that stays free here wakes the waiter."""
        free = [each for name, each in self.instances.items() if self.load(name) < each.limit]
        found = self.fake.run(commands.watch(self.pool, require, 0 if require else DAY_MS))
        assert found is any(require <= each.labels for each in free)
        if not found and not require:
            assert self.fake.client.hget(self.pool.keys.state, "#watched") is not None

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_queue(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.fake.run(commands.release(self.pool, token, tombstone_ms=DAY_MS)) is False
        del self.waiting[token]
        self.tombstones[token] = "cancelled"

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def stop_polling(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.waiting)))
        self.fake.client.zadd(self.pool.keys.due, {"W" + token: 1})
        self.fake.run(commands.status(self.pool, 0, 100))
        del self.waiting[token]

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def let_grant_expire(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.granted)))
        self.fake.client.zadd(self.pool.keys.due, {token: 1})
        self.fake.client.hset(self.pool.keys.state, "#next", 1)
        self.fake.run(commands.status(self.pool, 0, 100))
        del self.leases[token]
        self.granted.discard(token)
        self.tombstones[token] = "unfetched"
        self.forget_removed()

    def check_grants(self) -> None:
        """Read new grants from the state, and check that they respect the order of the queue."""
        state: dict[str, str] = self.fake.client.hgetall(self.pool.keys.state)
        for token in sorted(self.waiting, key=lambda each: int(self.positions.get(each, 2**62))):
            if records.kind_of(state[token]) == "waiting":
                continue
            assert records.kind_of(state[token]) in records.HELD
            # `token` got a grant. No earlier waiter may still be waiting if its labels are a subset of the labels of
            # `token`.
            for earlier, labels in self.waiting.items():
                assert not (
                    records.kind_of(state[earlier]) == "waiting"
                    and int(self.positions[earlier]) < int(self.positions.get(token, 2**62))
                    and labels <= self.waiting[token]
                )
        for token in [token for token in self.waiting if records.kind_of(state[token]) != "waiting"]:
            record = records.fields(state[token])
            name, fence = record["instance"], record["fence"]
            assert "resting" not in records.flags(state[name])
            self.leases[token] = name
            del self.waiting[token]
            self.granted.add(token)
            self.fences[name] = max(self.fences.get(name, 0), int(fence))
            if records.kind_of(state[token]) == "grant":
                self.fake.client.zadd(self.pool.keys.due, {token: 2 * 10**15})
        for name in self.instances:
            if self.load(name):
                self.peaks[name] = max(self.peaks.get(name, 0), self.load(name))

    @rule()
    def cancel_unknown_token(self) -> None:
        self.tokens += 1
        token = f"@{self.tokens}"
        assert self.fake.run(commands.release(self.pool, token, tombstone_ms=DAY_MS)) is False
        self.tombstones[token] = "cancelled"

    @precondition(lambda self: self.fetched())
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.fetched()))
        self.fake.client.zadd(self.pool.keys.due, {token: 1})
        self.fake.client.hset(self.pool.keys.state, "#next", 1)
        assert self.fake.run(commands.renew(self.pool, [token], DAY_MS)) == {token}
        page = self.fake.run(commands.status(self.pool, 0, 100))
        assert page is not None
        assert page.overdue == 0
        del self.leases[token]
        self.tombstones[token] = "expired"
        self.forget_removed()

    def refresh(self) -> None:
        """Read the health flags of the instances, and compute the limits from these flags."""
        state: dict[str, str] = self.fake.client.hgetall(self.pool.keys.state)
        for name, known in self.instances.items():
            if name in state:
                flags = records.flags(state[name])
                known.health = flags & HEALTH
                known.limit = limit_of(known.capacity, flags, state.get("+" + name), "#panic" in state)

    @invariant()
    def keys_expire_without_instances(self) -> None:
        assert (self.fake.client.pttl(self.pool.keys.state) > 0) is not bool(self.registered())

    @invariant()
    def state_is_the_models(self) -> None:
        self.refresh()
        self.check_grants()
        self.compare_records()
        self.compare_indexes()

    def compare_records(self) -> None:
        # If an instance has free capacity, no waiter that requires only labels of this instance may be in the queue.
        for name, each in self.instances.items():
            if self.load(name) < each.limit:
                assert not any(labels <= each.labels for labels in self.waiting.values())
        state: dict[str, str] = self.fake.client.hgetall(self.pool.keys.state)
        found = records.instances(state)
        assert {name[1:] for name in state if name[0] == "+"} <= set(found)
        assert set(found) == set(self.instances)
        for name, record in found.items():
            known = self.instances[name]
            assert int(record["load"]) == self.load(name)
            assert int(record["limit"]) == known.limit
            assert float(record["weight"]) == known.weight
            assert records.flags(state[name]) - HEALTH == known.flags
            assert int(record["cap"]) == known.capacity
            assert int(record["peak"]) == self.peaks.get(name, 0)
        tokens = {name: records.fields(record) for name, record in state.items() if name[0] == "@"}
        kinds = {token: records.kind_of(state[token]) for token in tokens}
        assert {token: tokens[token]["instance"] for token in records.held(state)} == self.leases
        assert {token for token, kind in kinds.items() if kind == "grant"} == self.granted
        assert {token for token, kind in kinds.items() if kind == "waiting"} == set(self.waiting)
        queue = self.fake.client.zrange(self.pool.keys.waitq, 0, -1)
        assert queue == sorted(self.waiting, key=lambda token: int(self.positions[token]))
        assert {token: tokens[token]["why"] for token, kind in kinds.items() if kind == "tombstone"} == self.tombstones
        assert int(state.get("#load", 0)) == len(self.leases)
        assert int(state.get("#cap", 0)) == sum(each.capacity for each in self.instances.values() if each.limit)
        usable = [each for each in self.instances.values() if not each.flags & DISABLED]
        out = [each for each in usable if each.health & UNHEALTHY]
        assert (int(state["#usable"]), int(state.get("#unhealthy", 0))) == (len(usable), len(out))
        warming = [each for each in usable if "warming" in each.health and not each.health & UNHEALTHY]
        assert int(state.get("#warming", 0)) == len(warming)
        assert ("#panic" in state) is (len(out) * 2 > len(usable))

    def compare_indexes(self) -> None:
        ready = {name for name, each in self.instances.items() if self.load(name) < each.limit}
        indexes: dict[str, set[str]] = {self.pool.keys.ready: ready}
        for label in LABELS:
            indexes[self.pool.keys.ready_with(label)] = {name for name in ready if label in self.instances[name].labels}
        state: dict[str, str] = self.fake.client.hgetall(self.pool.keys.state)
        for key, expected in indexes.items():
            scores: dict[str, float] = dict(self.fake.client.zrange(key, 0, -1, withscores=True))
            assert set(scores) == expected
            for name, score in scores.items():
                assert score == self.score(records.fields(state[name]))
        due: dict[str, float] = dict(self.fake.client.zrange(self.pool.keys.due, 0, -1, withscores=True))
        assert set(due) == (
            set(self.leases)
            | {"X" + token for token in self.tombstones}
            | {"W" + token for token in self.waiting}
            | {
                kind + name
                for name, each in self.registered().items()
                for flag, kind in TIMERS.items()
                if flag in each.health
            }
        )
        away = self.fake.client.zrange(self.pool.keys.tag + ":away", 0, -1)
        unhealthy_or_rate_limited = [
            n for n, each in self.instances.items() if each.health & (UNHEALTHY | BLOCKED) and not each.flags
        ]
        assert sorted(away) == sorted(unhealthy_or_rate_limited)
        assert not (ready and "#watched" in state), "a free instance wakes the watchers"
        if self.waiting or "#watched" in state:
            assert state["#next"] == "0"
        elif due:
            assert int(state["#next"]) <= min(due.values())
        ids: Any = self.fake.client.zrange(self.pool.keys.ids, 0, -1)
        assert set(ids) == set(self.registered())

    def score(self, record: dict[str, str]) -> float:
        load, limit, seq = (int(record[name]) for name in ("load", "limit", "seq"))
        if self.strategy is LoadBalancingStrategy.ROUND_ROBIN:
            return seq
        if self.strategy is LoadBalancingStrategy.WEIGHTED:
            return int(float(record["weight"]) * 1e9 * (limit - load) / limit)
        if self.strategy in (LoadBalancingStrategy.RANDOM, LoadBalancingStrategy.PEAK_EWMA):
            return 0
        return records.load_score(load, limit, seq)


class JumpyPoolMachine(PoolMachine):
    """Like PoolMachine, but with ejections, adaptive limits, warm-ups, rate limits and active checks."""

    settings = JUMPY


@pytest.mark.parametrize("machine", [PoolMachine, pytest.param(JumpyPoolMachine, marks=pytest.mark.thorough)])
@examples(4, 40)
def test_any_sequence_of_operations_matches_the_model(machine: type[PoolMachine], examples: int) -> None:
    effort = settings(max_examples=examples, stateful_step_count=45, deadline=None, phases=[Phase.generate])
    run_state_machine_as_test(machine, settings=effort)
