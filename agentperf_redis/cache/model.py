"""The types of the arguments and results of caches."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Self

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument, shown


class Policy(Enum):
    """Which entry a full cache evicts."""

    LRU = "lru"
    """The least recently read or written entry."""
    TINYLFU = "tinylfu"
    """Of the oldest new and the oldest established entry, the one that is read less often. Suits repeated scans."""


KINDS = {"cache": "lru", "tiered": "tiered"}
"""The name of each kind of cache in keys and in the list of resources -> the name that users see."""


ARGUMENTS = {
    "cache": ("policy", "", "", "max_size", "max_bytes", "", "", "default_ttl", "shards"),
    "tiered": (
        "policy",
        "hot_size",
        "warm_size",
        "cold_size",
        "max_bytes",
        "hot_ttl",
        "warm_ttl",
        "cold_ttl",
        "shards",
    ),
}
"""For each kind of cache, the constructor argument of each item of `Settings.fields`; empty if there is no argument."""


MAX_SHARDS = 256
MIN_SHARD_ENTRIES = 250
"""Minimum capacity of a shard. Each shard evicts on its own. With fewer entries, the hit ratio would fall."""


class WithoutServer(Enum):
    """How a value is computed while the server does not answer."""

    COMPUTE = "compute"
    """Return a stale local copy if `FreshnessOptions` allow it. Otherwise call the function, once per process."""
    RAISE = "raise"
    """Raise BackendUnavailable."""
    MISS = "miss"
    """Compute as with COMPUTE. Reads find nothing and writes store nothing, instead of raising BackendUnavailable."""


class Tier(Enum):
    """A tier of a TieredCache, with its own capacity and TTL.

    When an entry changes tiers, its name moves from the index of one tier to that of the other. The value is not moved.
    """

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"


TIERS = (Tier.HOT, Tier.WARM, Tier.COLD)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a cache, stored on the server for all processes. The settings that were sent last apply.

    Attributes:
        policy: which entry is evicted when the cache is full.
        capacities: maximum numbers of entries in hot, warm and cold; 0 is an unused tier.
        max_bytes: maximum bytes of all keys and values together; 0 is no limit.
        ttls_ms: default TTLs of entries placed in hot, warm and cold, ms; 0 is no expiry.
        shards: number of slots among which the entries and the limits are divided.
        layout: how often the number of shards was changed. Only the server sets `layout`, `target` and `source`.
        target: number of shards of the layout that is replacing this one; 0 if no change is in progress.
        source: number of shards of the previous layout if it still holds entries; 0 if it does not.
    """

    policy: Policy
    capacities: tuple[int, int, int]
    max_bytes: int
    ttls_ms: tuple[int, int, int]
    shards: int = 1
    layout: int = 0
    target: int = 0
    source: int = 0

    @property
    def own(self) -> Settings:
        """The settings that programs choose, without the state of the layout."""
        return replace(self, layout=0, target=0, source=0)

    @property
    def text(self) -> str:
        """The stored form: ``lru capacity 0/0/1000 bytes 0 ttl 0/0/300000``, and `` shards 4`` if there are several.

        The server appends the state of the layout; see relayout.lua.
        """
        capacities, ttls = ("/".join(map(str, each)) for each in (self.capacities, self.ttls_ms))
        shards = f" shards {self.shards}" if self.shards > 1 else ""
        return f"{self.policy.value} capacity {capacities} bytes {self.max_bytes} ttl {ttls}{shards}"

    def of_shard(self, shard: int) -> Settings:
        """Return the settings of one shard. The limits of all shards add up to those of the cache."""
        hot, warm, cold, maximum = (
            limit // self.shards + (shard < limit % self.shards) for limit in (*self.capacities, self.max_bytes)
        )
        return Settings(self.policy, (hot, warm, cold), maximum, self.ttls_ms)

    def check_shards(self, service: str) -> None:
        """Refuse limits that cannot be divided among the shards.

        Args:
            service: "cache" or "tiered". The two kinds of cache have different names for their limits.

        Raises:
            InvalidArgument: a limit is too small.
        """
        if self.shards == 1:
            return
        for argument, limit in zip(ARGUMENTS[service][1:5], (*self.capacities, self.max_bytes), strict=True):
            if 0 < limit < self.shards:  # a shard's share of 0 would mean no limit, or an unused tier
                raise InvalidArgument(argument, limit, f"at least {self.shards}, since the cache has as many shards")
        entries = self.shards * MIN_SHARD_ENTRIES
        if sum(self.capacities) < entries:
            argument, total = ("max_size", "") if service == "cache" else ("cold_size", " with hot_size and warm_size")
            why = f"so that each of its {self.shards} shards has {MIN_SHARD_ENTRIES}: smaller ones lower the hit ratio"
            raise InvalidArgument(argument, self.capacities[2], f"at least {entries} entries{total}, {why}")

    def shown(self, service: str) -> str:
        """The settings as users write them: ``max_size=1000, default_ttl=300, policy='lru'``.

        Args:
            service: "cache" or "tiered". The two kinds of cache have different names for their options.
        """

        def value(argument: str, field: str) -> str:
            if argument == "policy":
                return repr(field)
            if argument == "shards":
                return field
            if field == "0":
                return "None"
            return f"{int(field) / 1000:.15g}" if argument.endswith("_ttl") else field

        pairs = zip(ARGUMENTS[service], self.fields, strict=True)
        policy, *limits = (
            f"{argument}={value(argument, field)}"
            for argument, field in pairs
            if argument and (argument != "shards" or self.shards > 1)
        )
        return ", ".join((*limits, policy))

    @property
    def fields(self) -> tuple[str, ...]:
        """The nine values, in the order of `text`. A `given` text has a digit for each value: 1 if a user chose it."""
        return (self.policy.value, *map(str, (*self.capacities, self.max_bytes, *self.ttls_ms, self.shards)))

    @classmethod
    def of(cls, fields: Sequence[str]) -> Settings:
        """Build settings from their `fields`."""
        policy, *numbers = fields
        hot, warm, cold, maximum, hot_ms, warm_ms, cold_ms, shards = map(int, numbers)
        return cls(Policy(policy), (hot, warm, cold), maximum, (hot_ms, warm_ms, cold_ms), shards)

    @classmethod
    def parse(cls, text: str) -> Settings | None:
        """Build settings from their `text`; None if the text has another form."""
        found = _SETTINGS.fullmatch(text)
        if found is None:
            return None
        *fields, layout, target, source = found.groups()
        fields[-1] = fields[-1] or "1"
        return replace(cls.of(fields), layout=int(layout or 0), target=int(target or 0), source=int(source or 0))


ALL_GIVEN = "111111111"
NONE_GIVEN = "000000000"


class DefaultCount(int):
    """A default number of entries. It applies to a new cache; an existing cache keeps its own capacity."""


class DefaultSeconds(float):
    """A default TTL. It applies to a new cache; an existing cache keeps its own TTL."""


def chosen(value: object) -> bool:
    """Return whether an option of a cache was given by the user."""
    return value is not None and not isinstance(value, (DefaultCount, DefaultSeconds))


_SETTINGS = re.compile(
    r"(lru|tinylfu) capacity {0}/{0}/{0} bytes {0} ttl {0}/{0}/{0}(?: shards (2|4|8|16|32|64|128|256))?"
    r"(?: layout ([0-9]{{1,6}}))?(?: to ({1})| from ({1}))?".format(r"([0-9]{1,16})", "1|2|4|8|16|32|64|128|256")
)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A snapshot of an entry.

    Attributes:
        key: its key.
        value: its value.
        created_at: when the entry was stored, by the server's clock.
        expires_at: when the entry expires; None for never.
        access_count: reads counted so far.
        last_accessed: when the entry was last read, or None if it has not been read yet.
        tier: its present tier.
        tags: names by which it can be invalidated.
        size_bytes: bytes of its key and value as stored.
        compute_seconds: how long it took to compute the value; 0.0 if the value was put.
        version: rises with each value that is stored in the cache, or in the same shard of a cache with several shards;
            see the argument `if_version` of `put`.
        ttl: seconds until the entry expires, counted from this reading by the server's clock; `math.inf` for never. Two
            snapshots that differ only in `ttl` are equal.
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
    version: int = 0
    ttl: float = field(default=math.inf, compare=False)

    def is_expired(self) -> bool:
        """Return whether the entry has expired, by this machine's clock."""
        return self.expires_at is not None and datetime.now(UTC) > self.expires_at


class StoredCount(int):
    """How many values `put_many` stored.

    Attributes:
        refused: the keys whose values were not stored; see the result of `put`. If a reply was lost, these may include
            keys whose values were stored.
    """

    refused: tuple[str, ...]

    def __new__(cls, count: int, refused: tuple[str, ...] = ()) -> Self:
        """Return the count as an int that also has the refused keys."""
        made = super().__new__(cls, count)
        made.refused = refused
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[int, tuple[str, ...]]]:
        return type(self), (int(self), self.refused)


@dataclass(frozen=True, slots=True)
class TierStats:
    """The statistics of one tier of a cache.

    Attributes:
        size: entries in the tier.
        max_size: capacity of the tier.
        hits: reads that found their entry in this tier.
        misses: reads that did not find their entry in this tier or in a tier above it: a hit in warm is also a miss in
            hot.
    """

    size: int
    max_size: int
    hits: int
    misses: int

    @property
    def total_requests(self) -> int:
        """Reads that looked in this tier."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Fraction of `total_requests` that were hits, 0.0 to 1.0."""
        return self.hits / self.total_requests if self.total_requests else 0.0

    def render(self) -> dict[str, Any]:
        """Return the dict of `get_stats`."""
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
    """The statistics of a cache over all processes, since its first use.

    Attributes:
        name: name of the cache.
        kind: "lru" for an LRUCache, "tiered" for a TieredCache. An LRUCache and a TieredCache may have the same name.
        settings: the settings in effect.
        hot, warm, cold: statistics of the tiers; all entries of an LRUCache are in cold.
        hits: reads that returned a stored value.
        misses: reads that returned no stored value.
        size: entries in the cache. An expired entry counts until a sweep or a later write removes it. If the cache or
            the shard has at most 32 entries, the next write does so. With more entries, each write examines about one
            entry.
        bytes: bytes of all keys and values.
        evictions: entries removed because the cache was full.
        expirations: expired entries removed. If the server itself evicts keys, these may also count here.
        corrupt: reads that found bytes that are not a valid value. They also count as misses.
        seconds_saved: computing time that hits saved, seconds; only for values that were computed through the cache.
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
        """Capacity of the cache in entries."""
        return sum(self.settings.capacities)

    @property
    def max_bytes(self) -> int | None:
        """Capacity of the cache in bytes; None is no limit."""
        return self.settings.max_bytes or None

    @property
    def hit_rate(self) -> float:
        """Fraction of the reads that were hits, 0.0 to 1.0."""
        reads = self.hits + self.misses
        return self.hits / reads if reads else 0.0

    def render(self) -> dict[str, Any]:
        """Return the dict of `LRUCache.get_stats`."""
        return TierStats(self.size, self.max_size, self.hits, self.misses).render()

    def render_tiers(self) -> dict[str, dict[str, Any]]:
        """Return the dict of `TieredCache.get_stats`."""
        return {"hot": self.hot.render(), "warm": self.warm.render(), "cold": self.cold.render()}


TIERS_OWN_TTL_MS = -1
"""Stands for the default TTL of the tier in which the entry is placed."""
CACHES_OWN_TTLS_MS = (TIERS_OWN_TTL_MS,) * 3


def ttl_ms(argument: str, ttl: object) -> int:
    """Check a user's TTL and return it in ms. None becomes the tier's default; `math.inf` becomes 0, no expiry."""
    if ttl is None:
        return TIERS_OWN_TTL_MS
    seconds = arguments.seconds(argument, ttl, endless=True)
    return 0 if seconds == math.inf else math.ceil(seconds * 1000)


def default_ttl_ms(argument: str, ttl: object) -> int:
    """Check a user's default TTL of a tier and return it in ms. None and `math.inf` become 0, no expiry."""
    return 0 if ttl is None else max(0, ttl_ms(argument, ttl))


def checked_shards(shards: object) -> int:
    """Check the number of shards that a user chose. None becomes 1."""
    if shards is None:
        return 1
    allowed = f"a power of two, 1 to {MAX_SHARDS}"
    if type(shards) is not int or not 1 <= shards <= MAX_SHARDS or shards.bit_count() != 1:
        raise InvalidArgument("shards", shards, allowed)
    return shards


def chosen_tier(priority: Tier | str | None) -> Tier | None:
    """Check the tier of a put; None lets the policy place the entry."""
    if isinstance(priority, numbers.Real) and not isinstance(priority, bool):  # probably a TTL, as for `LRUCache.put`
        tiers = ", ".join(repr(tier.value) for tier in Tier)
        raise InvalidArgument("priority", priority, f"one of {tiers}; for a TTL, write ttl={shown(priority)}")
    return None if priority is None else arguments.choice("priority", priority, Tier)
