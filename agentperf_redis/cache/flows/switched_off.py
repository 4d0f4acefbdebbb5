"""Flows of a cache object that is switched off: reads find nothing, writes store nothing, values are always computed.

Arguments are checked as in any cache. Reads, writes and computations send nothing to the server. Invalidations are
still sent, because the cache may be switched on in other processes; see `misses.MissingEraser`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.cache.arguments import distinct_keys, stored_name, stored_tags
from agentperf_redis.cache.flows.misses import MissingEraser
from agentperf_redis.cache.flows.reads import Reader
from agentperf_redis.cache.flows.single_flight import SingleFlight
from agentperf_redis.cache.flows.writes import MAX_INTEGER, Writer
from agentperf_redis.cache.freshness import UNTIL_EXPIRY, Freshness
from agentperf_redis.cache.model import CacheEntry, StoredCount, Tier
from agentperf_redis.cache.process.compute_lease import ComputeLease
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument, NoInteger

_NOTHING_SENT: tuple[()] = ()
"""`yield from _NOTHING_SENT` makes a function a flow without steps."""


class IdleReader(Reader):
    """Reads that find nothing."""

    def get(self, key: str, default: Any) -> Flow[Any]:
        """Return the default."""
        yield from _NOTHING_SENT
        stored_name(key)
        return default

    def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> Flow[dict[str, Any]]:  # noqa: ARG002  as in Reader
        """Return an empty dict."""
        yield from _NOTHING_SENT
        distinct_keys(keys)
        return {}

    def entry(self, key: str) -> Flow[CacheEntry | None]:
        """Return None."""
        yield from _NOTHING_SENT
        stored_name(key)
        return None

    def ttl(self, key: str) -> Flow[float | None]:
        """Return None."""
        yield from _NOTHING_SENT
        stored_name(key)
        return None


class IdleWriter(Writer):
    """Writes that store nothing."""

    def put_in_mode(
        self,
        mode: str,  # noqa: ARG002  the signature in Writer
        key: str,
        value: Any,
        ttl: float | None,
        tags: Iterable[str],
        tier: Tier | None = None,  # noqa: ARG002
    ) -> Flow[bool]:
        """Return False."""
        yield from _NOTHING_SENT
        self.chosen_ttl(ttl)
        stored_tags(tags)
        stored_name(key)
        self.codec.encode(value)
        return False

    def touch(self, key: str, ttl: float | None) -> Flow[bool]:
        """Return False."""
        yield from _NOTHING_SENT
        stored_name(key)
        self.chosen_ttl(ttl)
        return False

    def increment(self, key: str, by: int, ttl: float | None, tags: Iterable[str], create: bool) -> Flow[int]:
        """Return `by`, since there is no stored value to add to. If `create` is False, raise NoInteger."""
        yield from _NOTHING_SENT
        self.chosen_ttl(ttl)
        stored_tags(tags)
        stored_name(key)
        number = arguments.count("by", by, minimum=-MAX_INTEGER, maximum=MAX_INTEGER)
        if not arguments.flag("create", create):
            raise NoInteger(key, "there is no value")
        return number

    def put_many(
        self,
        values: Mapping[str, Any],
        ttl: float | None,
        tags: Iterable[str],
        tier: Tier | None = None,
    ) -> Flow[StoredCount]:
        """Refuse all values."""
        if not isinstance(values, Mapping):
            raise InvalidArgument("values", values, "a mapping of keys to values")
        for key, value in values.items():
            yield from self.put_in_mode("", key, value, ttl, tags, tier)
        return StoredCount(0, tuple(values))


class IdleEraser(MissingEraser):
    """Invalidations, which are sent as in any cache."""

    def pop(self, key: str, default: Any) -> Flow[Any]:
        """Remove one entry, and return the default."""
        yield from self.delete(key)
        return default


class NoFlight(SingleFlight):
    """Computations without single flight: each caller computes its own value."""

    def value_or_lease(
        self,
        key: str,
        freshness: Freshness = UNTIL_EXPIRY,  # noqa: ARG002  the signature in SingleFlight
        *,
        look: bool = True,  # noqa: ARG002
        blocking: bool = False,  # noqa: ARG002
    ) -> Flow[ComputeLease]:
        """Return a lease that the server does not know, and for which no caller waits."""
        yield from _NOTHING_SENT
        return ComputeLease(self.shared, stored_name(key), key, "", self.lease_ms, None)

    def finish(
        self,
        compute_lease: ComputeLease,
        value: Any,  # noqa: ARG002  the signature in SingleFlight
        cost_s: float,  # noqa: ARG002
        ttl: float | None,  # noqa: ARG002
        tags: Iterable[str],  # noqa: ARG002
        freshness: Freshness = UNTIL_EXPIRY,  # noqa: ARG002
    ) -> tuple[InvalidArgument | None, Flow[None]]:
        """End a computation. The value is not stored, so it may be of any type."""
        return None, self.give_up(compute_lease)
