"""TieredCache with policy tinylfu against its model: any sequence of operations, with TTLs and tags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from agentperf_redis.cache import TieredCache
from tests.support.cache_machine import CacheMachine, Entry, run
from tests.support.cache_scan import faults
from tests.support.examples import examples
from tests.support.mutants import alter
from tests.support.servers import Server
from tests.support.tinylfu import COLD, NEW, TIERS, TinyLFU, differences

CAPACITIES = (1, 2, 3)
TTLS_S = (100, 200, 300)
KEYS = st.sampled_from("abcdefghijk")
TAGS = st.sets(st.sampled_from("tu"))
PUTS = st.tuples(
    KEYS,
    st.integers(0, 9),
    st.sampled_from((None, None, None, None, *TIERS[:NEW])),
    st.sampled_from((None, math.inf, 50)),
    TAGS,
)


@dataclass
class Held(Entry):
    """The model's record of a key. `TinyLFU` knows the key's tier."""

    value: int
    tags: frozenset[str]
    ttl_s: float
    reads: int = 0
    rewritten: bool = False
    """Whether an incr or a touch has changed the entry. If so, its TTL need not begin with its present version."""


class TinyLFUMachine(CacheMachine):
    """The state machine of the cache. Its model knows the values, and `TinyLFU` decides which entries stay."""

    cache: TieredCache

    def __init__(self) -> None:
        super().__init__()
        self.cache = TieredCache(*CAPACITIES, *TTLS_S, name="m", backend=self.backend)
        self.model: dict[str, Held] = {}
        self.policy = TinyLFU(*CAPACITIES)
        self.waiting: dict[str, int] = {}
        """Reads not reported yet, oldest first."""
        self.hits = self.misses = self.evictions = 0

    # the model

    def read(self, key: str) -> Held | None:
        held: Held | None = self.alive(key)
        self.unreported = True
        if held is None:
            self.misses += 1
        else:
            self.hits += 1
            held.reads += 1
            self.waiting[key] = self.waiting.pop(key, 0) + 1
        return held

    def take_in_reads(self) -> None:
        self.policy.touch(self.waiting)
        self.waiting.clear()
        self.unreported = False
        self.remove_expired()

    def removed(self, key: str) -> None:
        super().removed(key)
        self.policy.remove(key)

    def evicted(self) -> None:
        """Remove from the model the entries that the policy has evicted."""
        for key in [key for key in self.model if key not in self.policy]:
            del self.model[key]
            self.evictions += 1

    def reported(self) -> None:
        if self.unreported:
            self.take_in_reads()
            self.policy.balance()
            self.evicted()

    def stored(self, key: str, value: int, tier: str | None, ttl: float | None, tags: set[str]) -> None:
        self.take_in_reads()
        known = self.policy.find(key)
        place = TIERS.index(tier) if tier else NEW if known is None else known
        self.policy.put(key, {}, TIERS.index(tier) if tier else None)
        self.model[key] = Held(value, frozenset(tags), TTLS_S[min(place, COLD)] if ttl is None else ttl)
        self.evicted()

    # operations of users

    @rule(keys=st.lists(st.tuples(KEYS, st.integers(1, 3)), min_size=2, max_size=8))
    def get(self, keys: list[tuple[str, int]]) -> None:
        for key, times in keys:
            for _ in range(times):
                held = self.read(key)
                assert self.cache.get(key) == (held and held.value)

    @rule(keys=st.lists(KEYS, unique=True, max_size=5))
    def get_many(self, keys: list[str]) -> None:
        found = {key: held.value for key in keys if (held := self.read(key)) is not None}
        assert self.cache.get_many(keys) == found

    @rule(puts=st.lists(PUTS, min_size=1, max_size=8))
    def put(self, puts: list[tuple[str, int, str | None, float | None, set[str]]]) -> None:
        for key, value, tier, ttl, tags in puts:
            assert self.cache.put(key, value, tier, ttl=ttl, tags=tags) is True
            self.stored(key, value, tier, ttl, tags)
            self.read(key)
            assert self.cache.get(key) == value, "the next get finds the value"

    @rule(puts=st.lists(st.tuples(st.booleans(), PUTS), min_size=1, max_size=4))
    def add_or_replace(self, puts: list[tuple[bool, tuple[str, int, str | None, float | None, set[str]]]]) -> None:
        for adds, (key, value, tier, ttl, tags) in puts:
            stored = (self.alive(key) is None) is adds
            put = self.cache.add if adds else self.cache.replace
            assert put(key, value, tier, ttl=ttl, tags=tags) is stored
            if stored:
                self.stored(key, value, tier, ttl, tags)

    @rule(key=KEYS, by=st.integers(-300, 300))
    def incr(self, key: str, by: int) -> None:
        held = self.alive(key)
        if held is None:
            assert self.cache.incr(key, by) == by
            self.stored(key, by, None, None, set())
            return
        assert self.cache.incr(key, by) == held.value + by
        self.rewritten(key, held.value + by, held.ttl_s)

    @rule(key=KEYS, ttl=st.sampled_from((None, math.inf, 50)))
    def touch(self, key: str, ttl: float | None) -> None:
        held = self.alive(key)
        assert self.cache.touch(key, ttl) is (held is not None)
        if held is not None:
            self.rewritten(key, held.value, ttl)

    def rewritten(self, key: str, value: int, ttl: float | None) -> None:
        """An entry got another value or TTL, and kept its tags and reads."""
        held = self.model[key]
        self.stored(key, value, None, ttl, set(held.tags))
        if key in self.model:
            self.model[key].reads = held.reads
            self.model[key].rewritten = True

    @rule(key=KEYS)
    def pop(self, key: str) -> None:
        held = self.read(key)
        assert self.cache.pop(key) == (held and held.value)
        if held is not None:
            self.policy.delete(key)
            del self.model[key]

    @rule(key=KEYS, value=st.integers(0, 9))
    def get_or_compute(self, key: str, value: int) -> None:
        held = self.read(key)
        assert self.cache.get_or_compute(key, lambda: value) == (value if held is None else held.value)
        if held is None:
            self.stored(key, value, None, None, set())

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        if key in self.model or self.raw.exists(self.where.meta):
            self.policy.delete(key)
        self.deleted(key)

    @rule(tag=st.sampled_from("tu"))
    def invalidate_tag(self, tag: str) -> None:
        self.cache.invalidate_tags(tag)
        for held in self.model.values():
            held.dead |= tag in held.tags

    @rule(clear=st.sampled_from((False, False, True)))
    def clear_away(self, clear: bool) -> None:
        if clear:
            self.cleared()
            self.policy.clear()
        else:
            self.swept()
            self.policy.balance()

    @rule(keys=st.sets(KEYS, max_size=3))
    def time_passes(self, keys: set[str]) -> None:
        for key in sorted(keys):
            held = self.model.get(key)
            self.time_is_over(key, expires=held is not None and held.ttl_s != math.inf)

    @rule(key=KEYS)
    def entry(self, key: str) -> None:
        entry = self.cache.entry(key)
        self.reported()
        held: Held | None = self.alive(key)
        assert (entry is None) == (held is None)
        if entry is None or held is None:
            return
        place = self.policy.find(key)
        assert place is not None
        assert (entry.value, entry.tags, entry.access_count) == (held.value, held.tags, held.reads)
        assert entry.tier.value == TIERS[min(place, COLD)]
        stored_ttl: Any = (
            math.inf if entry.expires_at is None else (entry.expires_at - entry.created_at).total_seconds()
        )
        assert held.rewritten or stored_ttl == pytest.approx(held.ttl_s, abs=0.002)
        assert entry.ttl == pytest.approx(held.ttl_s, abs=30)

    @rule()
    def they_agree(self) -> None:
        if not self.raw.exists(self.where.meta):
            return
        stats = self.cache.stats()
        self.reported()
        assert (stats.size, stats.hits, stats.misses) == (len(self.model), self.hits, self.misses)
        assert stats.evictions == self.evictions
        assert differences(self.raw, self.where, self.policy) == []
        assert faults(self.raw, self.backend.namespace, "tiered", "m") == []


@examples(4, 40)
def test_any_sequence_of_operations_matches_the_model(
    server: Server, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    run(TinyLFUMachine, server, monkeypatch, examples)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "line", "instead"),
    [
        ("put", "if left_ms == -2 then I.remove(key)", "if left_ms == -2 then I.drop(key)"),
        ("put", "f = I.aged(at, remembered % 8) + 1", "f = 1"),
        (
            "invalidate_tags",
            "call('SET', EPOCHS, cleared .. ' ' .. version",
            "call('SET', EPOCHS, cleared .. ' ' .. cleared",
        ),
    ],
)
def test_script_fault_fails_the_check(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, line: str, instead: str
) -> None:
    alter(monkeypatch, f"cache/{name}", line, instead)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run(TinyLFUMachine, server, monkeypatch, examples=500)
