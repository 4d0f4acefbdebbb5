"""LRUCache against a plain model: any sequence of operations, on a real server, by one process."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, chores
from tests.integration.cache.scan import faults
from tests.servers import Raw, Server

MAX_SIZE = 4
KEYS = st.sampled_from("abcdefg")
TAGS = st.sets(st.sampled_from("tu"))
VALUES = st.one_of(st.none(), st.integers(), st.lists(st.integers(), max_size=3))


@dataclass
class Held:
    """What the model holds for a key."""

    value: Any
    tags: frozenset[str]
    expires: bool
    reads: int = 0
    dead: bool = False
    """A tag of it was invalidated; it keeps its place until it is overwritten or leaves."""
    expired: bool = False
    """Its time is over; it keeps its place until a put, a report or a sweep."""


class LRUMachine(RuleBasedStateMachine):
    """The rules; the model is an OrderedDict, the oldest first."""

    server: ClassVar[Server]

    def __init__(self) -> None:
        super().__init__()
        self.backend = Backend(self.server.url, namespace=uuid.uuid4().hex)
        self.raw: Raw = self.server.client()
        self.cache = LRUCache(MAX_SIZE, name="m", backend=self.backend)
        self.model: OrderedDict[str, Held] = OrderedDict()
        self.hits = self.misses = self.evictions = 0
        self.unreported = False
        self.where = self.cache._binding.keys

    def teardown(self) -> None:
        self.they_agree()
        self.backend.close()
        self.raw.close()

    def alive(self, key: str) -> Held | None:
        held = self.model.get(key)
        return None if held is None or held.dead or held.expired else held

    def reaped(self) -> None:
        for key in [key for key, held in self.model.items() if held.expired]:
            del self.model[key]

    def reported(self) -> None:
        if self.unreported:
            self.reaped()
        self.unreported = False

    def stored(self, key: str, value: Any, tags: set[str], expires: bool) -> None:
        self.unreported = False
        self.reaped()
        self.model.pop(key, None)
        self.model[key] = Held(value, frozenset(tags), expires)
        if len(self.model) > MAX_SIZE:
            self.model.popitem(last=False)
            self.evictions += 1

    @rule(keys=st.lists(KEYS, min_size=2, max_size=8))
    def get(self, keys: list[str]) -> None:
        for key in keys:
            held, self.unreported = self.alive(key), True
            assert self.cache.get(key, "nothing") == ("nothing" if held is None else held.value)
            if held is None:
                self.misses += 1
            else:
                self.hits += 1
                held.reads += 1
                self.model.move_to_end(key)

    @rule(keys=st.lists(KEYS, unique=True, max_size=4))
    def get_many(self, keys: list[str]) -> None:
        held = {key: entry for key in keys if (entry := self.alive(key)) is not None}
        self.unreported |= bool(keys)
        assert self.cache.get_many(keys) == {key: entry.value for key, entry in held.items()}
        self.misses += len(keys) - len(held)
        for key, entry in held.items():
            self.hits += 1
            entry.reads += 1
            self.model.move_to_end(key)

    @rule(puts=st.lists(st.tuples(KEYS, VALUES, TAGS, st.booleans()), min_size=1, max_size=6))
    def put(self, puts: list[tuple[str, Any, set[str], bool]]) -> None:
        for key, value, tags, expires in puts:
            assert self.cache.put(key, value, 600 if expires else None, tags=tags) is True
            self.stored(key, value, tags, expires)

    @rule(values=st.dictionaries(KEYS, VALUES, max_size=6), tags=TAGS)
    def put_many(self, values: dict[str, Any], tags: set[str]) -> None:
        assert self.cache.put_many(values, tags=tags) == len(values)
        for key, value in values.items():
            self.stored(key, value, tags, expires=False)

    @rule(key=KEYS, value=VALUES)
    def get_or_compute(self, key: str, value: Any) -> None:
        held = self.alive(key)
        assert self.cache.get_or_compute(key, lambda: value) == (value if held is None else held.value)
        if held is None:
            self.misses += 1
            self.stored(key, value, set(), expires=False)
        else:
            self.unreported = True
            self.hits += 1
            held.reads += 1
            self.model.move_to_end(key)

    @rule(
        key=KEYS, tag=st.sampled_from("tu"), how=st.sampled_from(("delete", "delete", "tag", "tag", "sweep", "clear"))
    )
    def forget(self, key: str, tag: str, how: str) -> None:
        if how == "delete":
            held = self.model.pop(key, None)
            assert self.cache.delete(key) is (held is not None and not held.expired)
        elif how == "tag":
            self.cache.invalidate_tags(tag)
            for each in self.model.values():
                each.dead |= tag in each.tags
        elif how == "sweep":
            self.cache.sweep()
            self.reaped()
        else:
            self.cache.clear()
            self.model.clear()

    @rule(key=KEYS)
    def time_passes(self, key: str) -> None:
        """The time of one entry is over, by the server's clock: the same as waiting, at once."""
        held = self.model.get(key)
        if held is None or not held.expires or held.expired:
            return
        self.cache.flush()  # a read that was not reported before its entry expired is booked, but moves nothing
        self.reported()
        if key not in self.model:
            return
        held.expired = True
        self.raw.delete(self.where.entry(key))
        self.raw.zadd(self.where.exp, {key: 1})
        self.raw.hset(self.where.meta, "next", 1)

    @rule(key=KEYS)
    def entry(self, key: str) -> None:
        held, entry = self.alive(key), self.cache.entry(key)
        self.reported()
        assert (entry is None) == (held is None)
        if entry is not None and held is not None:
            assert (entry.value, entry.tags, entry.access_count) == (held.value, held.tags, held.reads)
            assert (entry.expires_at is not None) == held.expires

    @rule()
    def they_agree(self) -> None:
        """Seldom, since looking reports all reads, which otherwise ride on the next put."""
        if not self.raw.exists(self.where.meta):
            return
        keys = self.cache.keys()
        self.reported()
        assert keys == list(self.model)
        stats = self.cache.stats()
        assert (stats.size, stats.hits, stats.misses) == (len(self.model), self.hits, self.misses)
        assert stats.evictions == self.evictions
        assert faults(self.raw, self.backend.namespace, "cache", "m") == []


@pytest.fixture
def machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LRUMachine]]:
    monkeypatch.setattr(chores, "REPORT_AFTER_S", 3600)  # reports go when the model says, not when a step took long
    LRUMachine.server = server
    yield LRUMachine
    del LRUMachine.server


def test_any_sequence_of_operations_agrees_with_the_model(machine: type[LRUMachine]) -> None:
    effort = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # shrinking over a network takes minutes
    )
    run_state_machine_as_test(machine, settings=effort)
