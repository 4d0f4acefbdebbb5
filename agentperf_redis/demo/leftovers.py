"""Sets a TTL on the keys that a demo leaves on the user's server. They can be inspected for a day."""

from __future__ import annotations

from collections.abc import Iterator

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Command, Reply
from agentperf_redis.demo.team import AGENTS, FILES_CACHE, MODULES_CACHE

DAY_S = 86_400
_NO_KEYS = {"tag", "bus", "entry_prefix", "lease_prefix"}
"""Fields of `CacheKeys` that are not keys. Two are prefixes of entries and compute leases, which have a TTL."""


def let_expire(backend: Backend, within: int = DAY_S) -> int:
    """Set a TTL on those keys of a finished demo that have none.

    The time slices of the metrics already have a TTL.

    Args:
        backend: backend of the demo's namespace.
        within: the TTL, s.

    Returns:
        The number of keys that got a TTL.
    """
    commands = tuple(Command("PEXPIRE", (key,), (within * 1000, "NX"), _was_set) for key in _keys(backend.namespace))
    return sum(reply is True for reply in backend.run(Batch(commands).settled()))


def _keys(namespace: str) -> Iterator[str]:
    yield keys.meta(namespace)
    yield keys.resources(namespace)
    for agent in AGENTS:
        pool = keys.pool(namespace, agent)
        yield from (*pool.all, pool.checks, pool.events, pool.away)
        shard, series = keys.metrics_shard(agent), keys.metrics_series(agent)
        yield keys.metrics_agents(namespace, shard)
        yield keys.metrics_settings(namespace, shard)
        yield keys.metrics_parts(namespace, shard, agent)
        for key in (keys.metrics_total, keys.metrics_latest, keys.metrics_slow):
            yield key(namespace, shard, series)
    for service, name in (("cache", FILES_CACHE), ("tiered", MODULES_CACHE)):
        its = keys.cache(namespace, service, name)
        yield from (key for name, key in its._asdict().items() if name not in _NO_KEYS)


def _was_set(reply: Reply) -> bool:
    return bool(reply == 1)
