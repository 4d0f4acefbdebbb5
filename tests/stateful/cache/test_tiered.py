"""TieredCache under policy lru against a simple model: promotion, demotion, eviction, TTLs."""

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
from tests.support.servers import Server

TIERS = ("hot", "warm", "cold")
CAPACITY = {"hot": 1, "warm": 2, "cold": 3}
TTLS_S = {"hot": 100, "warm": 200, "cold": 300}
KEYS = st.sampled_from("abcdefgh")

PUTS = st.tuples(
    KEYS, st.integers(0, 9), st.sampled_from((None, None, None, *TIERS)), st.sampled_from((None, math.inf, 50))
)


@dataclass
class Held(Entry):
    """The model's record of a key."""

    value: int
    tier: str
    at: int
    ttl_s: float


class TieredMachine(CacheMachine):
    """The state machine of the cache. Its model knows each entry's tier and the time of its last access."""

    cache: TieredCache

    def __init__(self) -> None:
        super().__init__()
        self.cache = TieredCache(*CAPACITY.values(), *TTLS_S.values(), policy="lru", name="m", backend=self.backend)
        self.model: dict[str, Held] = {}
        self.waiting: dict[str, int] = {}
        """Reads not reported yet, oldest first."""
        self.clock = 0
        self.hits = dict.fromkeys(TIERS, 0)
        self.misses = 0

    # the model

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def members(self, tier: str) -> list[str]:
        """The keys of a tier, oldest first."""
        return sorted(
            (key for key, held in self.model.items() if held.tier == tier), key=lambda key: self.model[key].at
        )

    def read(self, key: str) -> None:
        self.waiting[key] = self.waiting.pop(key, 0) + 1

    def report(self) -> None:
        for key, count in self.waiting.items():
            held = self.model.get(key)
            self.hits[held.tier if held else "cold"] += count
            if held:
                held.tier = TIERS[max(0, TIERS.index(held.tier) - count)]
                held.at = self.tick()
        self.waiting.clear()
        self.unreported = False

    def balance(self, keep: str | None = None) -> None:
        for tier, below in (("hot", "warm"), ("warm", "cold")):
            for key in self.members(tier)[: max(0, len(self.members(tier)) - CAPACITY[tier])]:
                self.model[key].tier = below
        while len(self.model) > sum(CAPACITY.values()):
            oldest = (self.members(tier)[:1] for tier in reversed(TIERS))
            del self.model[next(key for keys in oldest for key in keys if key != keep)]

    def reported(self) -> None:
        if self.unreported:
            self.report()
            self.remove_expired()
            self.balance()

    # operations of users

    @rule(keys=st.lists(st.tuples(KEYS, st.integers(1, 3)), min_size=2, max_size=8))
    def get(self, keys: list[tuple[str, int]]) -> None:
        for key, times in keys:
            for _ in range(times):
                held, self.unreported = self.alive(key), True
                assert self.cache.get(key) == (held and held.value)
                if held is None:
                    self.misses += 1
                else:
                    self.read(key)

    @rule(puts=st.lists(PUTS, min_size=1, max_size=6))
    def put(self, puts: list[tuple[str, int, str | None, float | None]]) -> None:
        for key, value, tier, ttl in puts:
            assert self.cache.put(key, value, tier, ttl=ttl) is True
            self.stored(key, value, tier, ttl)

    def stored(self, key: str, value: int, tier: str | None, ttl: float | None) -> None:
        self.report()
        self.remove_expired()
        known = self.model.get(key)
        place = tier or (known.tier if known else "cold")
        self.model[key] = Held(value, place, self.tick(), TTLS_S[place] if ttl is None else ttl)
        self.balance(key)

    @rule(puts=st.lists(st.tuples(st.booleans(), PUTS), min_size=1, max_size=4))
    def add_or_replace(self, puts: list[tuple[bool, tuple[str, int, str | None, float | None]]]) -> None:
        for adds, (key, value, tier, ttl) in puts:
            stored = (self.alive(key) is None) is adds
            put = self.cache.add if adds else self.cache.replace
            assert put(key, value, tier, ttl=ttl) is stored
            if stored:
                self.stored(key, value, tier, ttl)

    @rule(key=KEYS, ttl=st.sampled_from((None, math.inf, 50)))
    def touch(self, key: str, ttl: float | None) -> None:
        held = self.alive(key)
        assert self.cache.touch(key, ttl) is (held is not None)
        if held is not None:
            self.stored(key, held.value, None, ttl)
            entry = self.cache.entry(key)
            assert entry is not None
            assert entry.ttl == pytest.approx(self.model[key].ttl_s, abs=30)
            # The rule `entry` expects that the expiry is the creation time plus the TTL. A touch keeps the creation
            # time, so put the value again.
            self.cache.put(key, held.value, ttl=ttl)
            self.stored(key, held.value, None, ttl)

    @rule(key=KEYS, by=st.integers(-300, 300))
    def incr(self, key: str, by: int) -> None:
        held = self.alive(key)
        value = by if held is None else held.value + by
        assert self.cache.incr(key, by) == value
        self.stored(key, value, None, None if held is None else held.ttl_s)
        if held is not None:
            # An incr keeps the expiry and sets a new creation time. So put the value again, as in the rule `touch`.
            self.cache.put(key, value, ttl=held.ttl_s)
            self.stored(key, value, None, held.ttl_s)

    @rule(key=KEYS)
    def pop(self, key: str) -> None:
        held, self.unreported = self.alive(key), True
        assert self.cache.pop(key) == (held and held.value)
        if held is None:
            self.misses += 1
        else:
            self.removed(key)
            self.read(key)

    @rule(key=KEYS, how=st.sampled_from(("delete", "delete", "delete", "sweep", "sweep", "clear")))
    def forget(self, key: str, how: str) -> None:
        if how == "delete":
            self.deleted(key)
        elif how == "sweep":
            self.swept()
        else:
            self.cleared()

    @rule(key=KEYS)
    def time_passes(self, key: str) -> None:
        held = self.model.get(key)
        self.time_is_over(key, expires=held is not None and held.ttl_s != math.inf)

    @rule(key=KEYS)
    def entry(self, key: str) -> None:
        entry = self.cache.entry(key)
        self.reported()
        held = self.alive(key)
        assert (entry is None) == (held is None)
        if entry is None or held is None:
            return
        assert (entry.value, entry.tier.value) == (held.value, held.tier)
        stored_ttl: Any = (
            math.inf if entry.expires_at is None else (entry.expires_at - entry.created_at).total_seconds()
        )
        assert stored_ttl == pytest.approx(held.ttl_s, abs=0.002), "the TTL does not depend on the present tier"

    @rule()
    def they_agree(self) -> None:
        if not self.raw.exists(self.where.meta):
            return
        stats = self.cache.get_stats()
        self.reported()
        for tier in TIERS:
            assert self.raw.zrange(getattr(self.where, tier), 0, -1) == self.members(tier), tier
            assert stats[tier]["hits"] == self.hits[tier]
        assert stats["cold"]["misses"] == self.misses
        assert faults(self.raw, self.backend.namespace, "tiered", "m") == []


@examples(4, 50)
def test_any_sequence_of_operations_matches_the_model(
    server: Server, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    run(TieredMachine, server, monkeypatch, examples)
