"""A model of `lua/cache/includes/index.lua` and `put.lua` in plain Python: the state of a cache under tinylfu.

Source: Einziger, Friedman, Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions on Storage 13
(2017), for admission and ageing. The window adapts by means of ghosts, similarly to ARC (Megiddo, Modha, FAST 2003).
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentperf_redis.cache.entry_format import pack_score, unpack_score
from agentperf_redis.keys import CacheKeys
from tests.support.servers import Raw

HOT, WARM, COLD, NEW = range(4)
TIERS = ("hot", "warm", "cold", "new")
WINDOW_PART, STEP_PART, MISSED_PART, TAIL_PART = 0.01, 0.03, 0.1, 0.1
GHOSTS, MIN_GHOSTS = 2, 16
PERIOD, PERIODS, RESTS = 4, 4, 8
"""PERIOD: accesses in a period, as a multiple of the cache's size. PERIODS: periods between two halvings of the
frequencies. RESTS: periods in which the window keeps its size after it has returned to an earlier size. If the
hit ratio does not return, the window rests for only two periods."""
FILLING, FILLED = -3.0, -2.0
"""Values that stand in place of the last hit ratio. FILLING: nothing has been evicted yet. FILLED: the cache became
full during the last period. FILLED + 1: it became full in the period before."""
MOST, GHOSTS_MOST, FROM_WINDOW = 15, 7, 8


class Ranked(dict[str, int]):
    """Members by score, as in a sorted set."""

    def order(self) -> list[str]:
        """Return the members from the lowest score to the highest."""
        return sorted(self, key=lambda key: (self[key], key))


class TinyLFU:
    """The indexes of a cache, and the rules that change them.

    Args:
        capacities: capacities of hot, warm and cold; hot and warm may be 0.
    """

    def __init__(self, *capacities: int) -> None:
        self.capacities = capacities
        self.total = sum(capacities)
        self.tiers = [Ranked(), Ranked(), Ranked(), Ranked()]
        self.ghosts = Ranked()
        self.clock = 0
        self.start_adapting()
        self.halvings = [0, 0, 0, 0]
        self.top = next(tier for tier in (HOT, WARM, COLD) if capacities[tier])

    def __len__(self) -> int:
        return sum(map(len, self.tiers))

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> int | None:
        """Return the tier of a key."""
        return next((tier for tier in (HOT, WARM, COLD, NEW) if key in self.tiers[tier]), None)

    def share(self, part: float) -> int:
        return math.floor(min(self.total, len(self)) * part)

    def start_adapting(self) -> None:
        self.grow = 0.0
        self.accesses = self.hits = 0
        """The accesses and hits of the current period."""
        self.trend = 0.0
        self.rests = self.age = 0
        self.last_ratio, self.last_grow = FILLING, 0.0

    def aged(self, frequency: int, written: int) -> int:
        return frequency >> sum(written < halving for halving in self.halvings)

    def frequency(self, score: int) -> int:
        written, frequency = unpack_score(score)
        return self.aged(frequency, written)

    def tick(self, accesses: int, hits: int, entries: int) -> None:
        self.clock += 1
        self.accesses += accesses
        self.hits += hits
        if self.accesses >= PERIOD * self.total:
            self.compare_periods(entries)
            self.age += 1
            if self.age >= PERIODS:
                self.age = 0
                self.halvings = [self.clock, *self.halvings[:3]]

    def signal(self, direction: int, entries: int) -> None:
        """Move the window by a step, if most of the recent signals have this direction."""
        if self.rests:
            return
        self.trend += (direction - self.trend) / 20
        agreement = self.trend * direction
        if agreement > 0:
            moved = self.grow + direction * entries * STEP_PART * agreement * agreement
            self.grow = max(0.0, min(max(0, self.total - 2), moved))

    def compare_periods(self, entries: int) -> None:
        """At the end of a period, undo a change of the window if it has cost hits."""
        accesses, ratio = self.accesses, min(1.0, self.hits / self.accesses)
        self.accesses = self.hits = 0
        if self.rests:
            self.rests -= 1
            if self.rests == RESTS - 1:
                return
            if self.rests == RESTS - 2 and self.has_fallen(ratio, accesses):
                self.rests = 0
        elif self.ghosts_before == 0:
            ratio = FILLING
        elif self.last_ratio in (FILLING, FILLED):
            ratio = self.last_ratio + 1
        elif ratio < self.last_ratio and abs(self.grow - self.last_grow) > entries * 0.05:
            if self.has_fallen(ratio, accesses):
                self.grow, self.trend, self.rests = self.last_grow, 0.0, RESTS
            return
        self.last_ratio, self.last_grow = ratio, self.grow

    def has_fallen(self, ratio: float, accesses: int) -> bool:
        """Return whether a period's hit ratio is clearly lower than the last one."""
        if self.last_ratio <= 0:
            return False
        chance = math.sqrt(2 * self.last_ratio * (1 - self.last_ratio) / accesses)
        return ratio < min(self.last_ratio * 0.95, self.last_ratio - 3 * chance)

    def touch(self, reads: dict[str, int]) -> None:
        """Record reads, oldest first."""
        self.ghosts_before = len(self.ghosts)
        tail: float = -1
        if self.grow >= 1:
            cold, rank = self.tiers[COLD].order(), self.share(TAIL_PART)
            tail = self.tiers[COLD][cold[rank]] if rank < len(cold) else math.inf
        for key, count in reads.items():
            tier = self.find(key)
            if tier is None:
                continue
            entries = min(self.total, len(self))
            score = self.tiers[tier].pop(key)
            self.tick(count, count, entries)
            if tier == COLD and self.grow >= 1 and score <= tail:
                self.signal(-1, entries)
            to = tier
            if tier not in (NEW, self.top):
                to = max(self.top, tier - count)
                while to < COLD and not self.capacities[to]:
                    to += 1
            self.tiers[to][key] = pack_score(self.clock, min(MOST, self.frequency(score) + count))

    def put(self, key: str, reads: dict[str, int], tier: int | None = None) -> None:
        """Record reads and write a key. Without `tier`, the policy chooses the tier."""
        self.touch(reads)
        self.tick(1, 0, min(self.total, len(self)))
        known = self.find(key)
        if known is not None:
            frequency = min(MOST, self.frequency(self.tiers[known].pop(key)) + 1)
            tier = known if tier is None else tier
        else:
            frequency = 1
            ghost = self.ghosts.get(key)
            if ghost is not None:
                evicted, remembered = unpack_score(ghost)
                frequency = self.aged(remembered % FROM_WINDOW, evicted) + 1
                if remembered >= FROM_WINDOW:
                    self.missed(ghost)
                del self.ghosts[key]
            tier = NEW if tier is None else tier
        if tier != NEW and not self.capacities[tier]:
            tier = COLD
        self.tiers[tier][key] = pack_score(self.clock, frequency)
        self.balance(key)

    def missed(self, ghost: int) -> None:
        """Widen the window if a key that is stored again was evicted only recently."""
        rank = min(self.total, len(self) + 1) * MISSED_PART
        order = self.ghosts.order()[::-1]
        mark = self.ghosts[order[math.floor(rank)]] if math.floor(rank) < len(order) else None
        if mark is None or ghost > mark:
            self.signal(1, min(self.total, len(self) + 1))

    def delete(self, key: str) -> None:
        tier = self.find(key)
        if tier is not None:
            del self.tiers[tier][key]
        self.clock += 1

    def remove(self, key: str) -> None:
        """Remove an expired or swept entry: no ghost is kept, and the clock does not advance."""
        tier = self.find(key)
        assert tier is not None
        del self.tiers[tier][key]

    def clear(self) -> None:
        for tier in (*self.tiers, self.ghosts):
            tier.clear()
        self.start_adapting()
        self.halvings = [0, 0, 0, 0]

    def balance(self, keep: str | None = None) -> None:
        """Bring hot, warm, the window and the whole cache within their capacities."""
        for tier in (HOT, WARM):
            while len(self.tiers[tier]) > self.capacities[tier]:
                oldest = self.tiers[tier].order()[0]
                below = WARM if tier == HOT and self.capacities[WARM] else COLD
                self.tiers[below][oldest] = self.tiers[tier].pop(oldest)
        evicted = 0
        while True:
            base = max(1, math.floor(min(self.total, len(self)) * WINDOW_PART + 0.5))
            wide = len(self.tiers[NEW]) > min(base + math.floor(self.grow), max(1, self.total - 1))
            if len(self) <= self.total:
                if not wide:
                    break
                young = self.tiers[NEW].order()[0]
                self.tiers[COLD][young] = self.tiers[NEW].pop(young)
                continue
            victims = ((tier, key) for tier in (COLD, WARM, HOT) for key in self.tiers[tier].order()[:1] if key != keep)
            victim = next(victims, None)
            youngest = [key for key in self.tiers[NEW].order()[:1] if key != keep]
            newcomer = next(iter(youngest), None) if wide or victim is None else None
            if newcomer is not None and victim is not None:
                if self.frequency(self.tiers[NEW][newcomer]) > self.frequency(self.tiers[victim[0]][victim[1]]):
                    self.evict(*victim)
                    self.tiers[COLD][newcomer] = self.tiers[NEW].pop(newcomer)
                else:
                    self.evict(NEW, newcomer)
            elif victim is not None:
                self.evict(*victim)
            elif newcomer is not None:
                self.evict(NEW, newcomer)
            else:
                break
            evicted += 1
        if evicted and (evicted > 4 or self.accesses % 16 == 0):
            for ghost in self.ghosts.order()[: -max(MIN_GHOSTS, self.share(GHOSTS))]:
                del self.ghosts[ghost]

    def evict(self, tier: int, key: str) -> None:
        frequency = min(GHOSTS_MOST, self.frequency(self.tiers[tier].pop(key)))
        self.ghosts[key] = pack_score(self.clock, (FROM_WINDOW if tier == NEW else 0) + frequency)


def differences(raw: Raw, where: CacheKeys, model: TinyLFU) -> list[str]:
    """Return the differences between the server's state and the model."""

    def stored(name: str) -> list[tuple[str, int]]:
        members = raw.zrange(getattr(where, name), 0, -1, withscores=True)
        return [(key, unpack_score(score)[1]) for key, score in members]

    pairs: dict[str, tuple[Any, Any]] = {
        name: (stored(name), [(key, unpack_score(tier[key])[1]) for key in tier.order()])
        for name, tier in zip((*TIERS, "ghost"), (*model.tiers, model.ghosts), strict=True)
    }
    meta = raw.hgetall(where.meta)
    pairs["accesses"] = int(meta.get("accesses", 0)), model.hits * 10**8 + model.accesses
    pairs["grow"] = pytest.approx(float(meta.get("grow", 0))), model.grow
    pairs["climb"] = (
        pytest.approx([float(number) for number in meta.get("climb", "0 0 -3 0 0").split()]),
        [model.trend, model.rests, model.last_ratio, model.last_grow, model.age],
    )
    pairs["halvings"] = (
        [halving != "0" for halving in meta.get("halvings", "0 0 0 0").split()],
        [halving != 0 for halving in model.halvings],
    )
    return [f"{name}: {here}, but the model has {there}" for name, (here, there) in pairs.items() if here != there]
