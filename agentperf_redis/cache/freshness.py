"""The rules for how long a value is fresh and how it is treated afterwards. This module does no I/O.

A value is fresh for its soft TTL, stale until its hard TTL, and then expired. All readers get a stale value without
waiting. Meanwhile, one caller among all processes computes the next value in the background (stale-while-revalidate,
RFC 5861). If that computation fails, the stale value is still returned, but for a limited time (stale-if-error in the
RFC, fail-safe elsewhere). A value is never returned after its invalidation or after its hard TTL.

For values that must not even become stale, each reader decides at random whether to refresh early. The probability
rises as the expiry approaches. It rises earlier for a value that takes longer to compute. This is XFetch (Vattani,
Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", PVLDB 8, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypedDict

from agentperf_redis import arguments, random_numbers
from agentperf_redis.errors import InvalidArgument

MAX_JITTER = 0.5
MAX_EARLY_REFRESH = 100.0
_MIN_RETRY_MS, _MAX_RETRY_MS = 1000, 30_000
"""Bounds of the time without a retry after a failed refresh, ms. This time is a tenth of the soft TTL."""


class FreshnessOptions(TypedDict, total=False):
    """Options of `get_or_compute` and `cached`, all of them off by default.

    Attributes:
        soft_ttl: seconds for which a value is fresh. From then until the TTL, readers get the stale value without
            waiting. Meanwhile, one caller among all processes computes the next value in the background.
        jitter: fraction by which the soft TTL is varied at random, such as 0.1 for 10 %. So values that were stored
            together are not due together. Without a soft TTL, the TTL is varied.
        early_refresh: how eagerly to refresh before a value becomes stale, or before it expires if it has no soft TTL.
            1.0 is XFetch as published, higher values refresh earlier, 0 is off.
        stale_if_error: seconds, counted from the end of the soft TTL, for which a stale value is returned if computing
            the next value fails. It is never returned beyond the TTL, so more than ``ttl - soft_ttl`` has no further
            effect. After this time, the value counts as missing: readers call the function, one at a time among all
            processes, and see its error. None means until the TTL. If `soft_ttl` or `stale_if_error` is given, the same
            time applies to outages: while the server is unreachable, local copies that were valid at the last contact
            are returned.
    """

    soft_ttl: float | None
    jitter: float
    early_refresh: float
    stale_if_error: float | None


class Aging(Protocol):
    """The fields that decide the age of an entry. Stored entries and local copies have them."""

    @property
    def expires_ms(self) -> int:
        """When the entry expires, by the server's clock; 0 for never."""
        ...

    @property
    def fresh_until_ms(self) -> int:
        """When the entry is due for a refresh; 0 if it stays fresh until it expires."""
        ...

    @property
    def cost_ms(self) -> int:
        """How long computing it took, ms."""
        ...


class Age(Enum):
    """How to treat a value that was found."""

    FRESH = "return it"
    DUE = "return it, and refresh it in the background"
    OLD = "as DUE, unless computing it is known to fail"


@dataclass(frozen=True, slots=True)
class Freshness:
    """The options of one call, checked; see `FreshnessOptions`.

    Attributes:
        soft_ms: how long a value is fresh, ms; 0 is until it expires.
        jitter: fraction by which the soft TTL varies, or the TTL if there is no soft TTL.
        early: how eagerly to refresh before a value is stale.
        error_ms: how long a stale value is returned if computing the next one fails, ms; None is until it expires.
    """

    soft_ms: int = 0
    jitter: float = 0.0
    early: float = 0.0
    error_ms: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], ttl: float | None) -> Freshness:
        """Check the options that a user gave.

        Raises:
            InvalidArgument: an option is unknown or its value is invalid.
        """
        if not options:
            return UNTIL_EXPIRY
        unknown = set(options) - FreshnessOptions.__optional_keys__
        if unknown:
            allowed = ", ".join(sorted(FreshnessOptions.__optional_keys__))
            raise InvalidArgument(min(unknown), options[min(unknown)], f"no such option; there are {allowed}")
        soft, limit = options.get("soft_ttl"), options.get("stale_if_error")
        soft_ms = 0 if soft is None else math.ceil(arguments.seconds("soft_ttl", soft) * 1000)
        if soft is not None and ttl is not None and soft >= ttl:
            raise InvalidArgument("soft_ttl", soft, f"less than the ttl of {ttl:g} s, at which the value expires")
        return cls(
            soft_ms,
            arguments.amount("jitter", options.get("jitter", 0.0), maximum=MAX_JITTER),
            arguments.amount("early_refresh", options.get("early_refresh", 0.0), maximum=MAX_EARLY_REFRESH),
            None if limit is None else round(arguments.seconds("stale_if_error", limit, minimum=0.0) * 1000),
        )

    @property
    def retry_ms(self) -> int:
        """The time for which no process retries after a failed refresh, ms."""
        return max(_MIN_RETRY_MS, min(_MAX_RETRY_MS, self.soft_ms // 10))

    @property
    def serve_stale_s(self) -> float:
        """How long a local copy may be returned during an outage, seconds; 0.0 unless an option allows it."""
        if self.error_ms is not None:
            return self.error_ms / 1000
        return math.inf if self.soft_ms else 0.0

    def spread(self, ttl_ms: int) -> int:
        """Return a duration varied by the jitter. A duration of 0 or less has a special meaning and is not varied."""
        if not self.jitter or ttl_ms <= 0:
            return ttl_ms
        return max(1, round(ttl_ms * (1 + self.jitter * (2 * random_numbers.fraction() - 1))))

    def concerns(self, entry: Aging) -> bool:
        """Return whether `age` must classify an entry. Any other entry is fresh until it expires."""
        return entry.fresh_until_ms > 0 or (self.early > 0 and entry.expires_ms > 0)

    def age(self, entry: Aging, now_ms: int, chance: Callable[[], float] = random_numbers.fraction) -> Age:
        """Classify an entry by its age.

        Args:
            entry: an entry that has not expired.
            now_ms: the server's time.
            chance: returns a random number, at least 0.0 and below 1.0.
        """
        due_ms = entry.fresh_until_ms or (entry.expires_ms if self.early else 0)
        if not due_ms:
            return Age.FRESH
        ahead_ms = entry.cost_ms * self.early * -math.log(1.0 - chance()) if self.early else 0.0
        if now_ms + ahead_ms < due_ms:
            return Age.FRESH
        if self.error_ms is not None and entry.fresh_until_ms and now_ms >= entry.fresh_until_ms + self.error_ms:
            return Age.OLD
        return Age.DUE


UNTIL_EXPIRY = Freshness()
"""The default options: a value is fresh until it expires."""
