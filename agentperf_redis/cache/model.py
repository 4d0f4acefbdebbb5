"""The values that caches take and give."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from agentperf_redis import arguments


class Policy(Enum):
    """Who leaves a full cache."""

    LRU = "lru"
    """The least recently read or written entry."""
    TINYLFU = "tinylfu"
    """The less frequently read of the oldest newcomer and the oldest established entry; suits repeated scans."""


KINDS = {"cache": "lru", "tiered": "tiered"}
"""What users call the two kinds of caches, by what keys and the list of resources call them."""


ARGUMENTS = {
    "cache": ("policy", "", "", "max_size", "max_bytes", "", "", "default_ttl"),
    "tiered": ("policy", "hot_size", "warm_size", "cold_size", "max_bytes", "hot_ttl", "warm_ttl", "cold_ttl"),
}
"""What users call the fields of the settings, by kind; an LRUCache leaves some unused."""


class WithoutServer(Enum):
    """What becomes of whoever wants a value to be computed while the server does not answer."""

    COMPUTE = "compute"
    """A copy within this process stands in, where `FreshnessOptions` allow; else the function runs, once a process."""
    RAISE = "raise"
    """BackendUnavailable."""


class Tier(Enum):
    """A keyspace of a TieredCache, with its own room and its own TTL. Values do not move when their tier changes."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"


TIERS = (Tier.HOT, Tier.WARM, Tier.COLD)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all processes that use a cache agree on. It is stored with the cache; the last one deployed holds.

    Attributes:
        policy: who leaves when the cache is full.
        capacities: entries that hot, warm and cold hold; 0 is an unused tier.
        max_bytes: bytes of all keys and values together; 0 is no limit.
        ttls_ms: life of an entry placed in hot, warm, cold when none is given, ms; 0 is for ever.
    """

    policy: Policy
    capacities: tuple[int, int, int]
    max_bytes: int
    ttls_ms: tuple[int, int, int]

    @property
    def text(self) -> str:
        """The form in which it is stored: ``lru capacity 0/0/1000 bytes 0 ttl 0/0/300000``."""
        capacities, ttls = ("/".join(map(str, each)) for each in (self.capacities, self.ttls_ms))
        return f"{self.policy.value} capacity {capacities} bytes {self.max_bytes} ttl {ttls}"

    def shown(self, service: str) -> str:
        """The same as users wrote it: ``max_size=1000, default_ttl=300, policy='lru'``.

        Args:
            service: "cache" or "tiered", whose options have their own names.
        """

        def value(argument: str, field: str) -> str:
            if argument == "policy":
                return repr(field)
            if field == "0":
                return "None"
            return f"{int(field) / 1000:.15g}" if argument.endswith("_ttl") else field

        pairs = zip(ARGUMENTS[service], self.fields, strict=True)
        policy, *limits = (f"{argument}={value(argument, field)}" for argument, field in pairs if argument)
        return ", ".join((*limits, policy))

    @property
    def fields(self) -> tuple[str, ...]:
        """Its eight values in the order of `text`. Which of them somebody chose is noted as 1 or 0 for each."""
        return (self.policy.value, *map(str, (*self.capacities, self.max_bytes, *self.ttls_ms)))

    @classmethod
    def of(cls, fields: Sequence[str]) -> Settings:
        """Undo `fields`."""
        policy, hot, warm, cold, maximum, *ttls = fields
        hot_ms, warm_ms, cold_ms = map(int, ttls)
        return cls(Policy(policy), (int(hot), int(warm), int(cold)), int(maximum), (hot_ms, warm_ms, cold_ms))

    @classmethod
    def parse(cls, text: str) -> Settings | None:
        """Undo `text`; None for what is no such form."""
        found = _SETTINGS.fullmatch(text)
        return None if found is None else cls.of(found.groups())


ALL_GIVEN = "11111111"


class DefaultCount(int):
    """A number of entries that nobody chose: it is for a new cache, and gives way to what the cache has."""


class DefaultSeconds(float):
    """A life that nobody chose."""


def chosen(value: object) -> bool:
    """Return whether an option of a cache was given by the user."""
    return value is not None and not isinstance(value, (DefaultCount, DefaultSeconds))


_SETTINGS = re.compile(r"(lru|tinylfu) capacity (\d+)/(\d+)/(\d+) bytes (\d+) ttl (\d+)/(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An entry as it was at one moment.

    Attributes:
        key: its key.
        value: its value.
        created_at: when it was stored, by the server's clock.
        expires_at: when it expires, or None.
        access_count: reads counted so far.
        last_accessed: when it was last read, or None if it never was.
        tier: where it stands now.
        tags: what it can be invalidated by.
        size_bytes: bytes of its key and value as stored.
        compute_seconds: what computing it took, 0.0 if it was put.
    """

    key: str
    value: Any
    created_at: datetime
    expires_at: datetime | None
    access_count: int = 0
    last_accessed: datetime | None = None
    tier: Tier = Tier.COLD
    tags: frozenset[str] = frozenset()
    size_bytes: int = 0
    compute_seconds: float = 0.0

    def is_expired(self) -> bool:
        """Return whether its time is over, by this machine's clock."""
        return self.expires_at is not None and datetime.now(UTC) > self.expires_at


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier of a cache.

    Attributes:
        size: entries in it.
        max_size: its room.
        hits: reads that found their entry in it.
        misses: reads that came to it and had to go on: a hit in warm is a miss of hot.
    """

    size: int
    max_size: int
    hits: int
    misses: int

    @property
    def total_requests(self) -> int:
        """Reads that came to this tier."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Part of them that was served, 0.0 to 1.0."""
        return self.hits / self.total_requests if self.total_requests else 0.0

    def render(self) -> dict[str, Any]:
        """Return it as `get_stats` shows it."""
        return {
            "size": self.size,
            "max_size": self.max_size,
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": f"{self.hit_rate:.1%}",
            "total_requests": self.total_requests,
        }


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A cache as all processes together have used it, since it was first used.

    Attributes:
        name: of the cache.
        kind: "lru" for an LRUCache, "tiered" for a TieredCache; one of each may have the same name.
        settings: its limits, as last deployed.
        hot, warm, cold: its tiers; an LRUCache has all in cold.
        hits: reads served.
        misses: reads not served.
        size: entries in it. What has expired counts until a later write, or a sweep, has cleared it away.
        bytes: of all keys and values.
        evictions: entries that had to make room.
        expirations: entries cleared away after their time.
        corrupt: reads that met bytes which were no value; they count as misses, too.
        seconds_saved: computing time that hits have saved, as far as the cache saw the computing.
    """

    name: str
    kind: str
    settings: Settings
    hot: TierStats
    warm: TierStats
    cold: TierStats
    hits: int
    misses: int
    size: int
    bytes: int
    evictions: int
    expirations: int
    corrupt: int
    seconds_saved: float

    @property
    def max_size(self) -> int:
        """Entries it holds at most."""
        return sum(self.settings.capacities)

    @property
    def max_bytes(self) -> int | None:
        """Bytes it holds at most, or None."""
        return self.settings.max_bytes or None

    @property
    def hit_rate(self) -> float:
        """Part of the reads that was served, 0.0 to 1.0."""
        reads = self.hits + self.misses
        return self.hits / reads if reads else 0.0

    def render(self) -> dict[str, Any]:
        """Return it as `LRUCache.get_stats` shows it."""
        return TierStats(self.size, self.max_size, self.hits, self.misses).render()

    def render_tiers(self) -> dict[str, dict[str, Any]]:
        """Return it as `TieredCache.get_stats` shows it."""
        return {"hot": self.hot.render(), "warm": self.warm.render(), "cold": self.cold.render()}


TIERS_OWN_TTL_MS = -1
"""Stands for the TTL of the tier in which the entry is placed."""
CACHES_OWN_TTLS_MS = (TIERS_OWN_TTL_MS,) * 3


def ttl_ms(argument: str, ttl: object) -> int:
    """Check a life given by a user; None is the tier's own, `math.inf` is 0: for ever."""
    if ttl is None:
        return TIERS_OWN_TTL_MS
    seconds = arguments.seconds(argument, ttl, endless=True)
    return 0 if seconds == math.inf else math.ceil(seconds * 1000)


def default_ttl_ms(argument: str, ttl: object) -> int:
    """Check a tier's life given by a user; None and `math.inf` are 0: for ever."""
    return 0 if ttl is None else max(0, ttl_ms(argument, ttl))


def chosen_tier(priority: Tier | str | None) -> Tier | None:
    """Check the tier that a put names; None lets the policy place the entry."""
    return None if priority is None else arguments.choice("priority", priority, Tier)
