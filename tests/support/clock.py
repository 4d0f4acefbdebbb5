"""Simulates that a server's clock was set back, by changing the stored times.

A test cannot set the clock of its machine. Instead, it moves all stored times into the future. The clock is then behind
the stored times, as if it had been set back. The absolute times differ from those after a real change of the clock, but
a script cannot detect this.
"""

from __future__ import annotations

from typing import Any

from agentperf_redis.keys import CacheKeys, PoolKeys
from tests.support import records

_TIMES = {"fence": 10**6, "ticket": 10**6, "ewma_at_ms": 1000, "ejected_until_ms": 1000, "probe_since_us": 10**6} | {
    "limit_cut_us": 10**6,
    "checked_ms": 1000,
    "metered_us": 10**6,
    "rest_until_ms": 1000,
    "rest_set_ms": 1000,
    "rpm_arrival_us": 10**6,
    "tpm_arrival_us": 10**6,
}
"""The fields of a pool's records that hold times, and their units per second."""
_FACTS = {"#born": 10**6, "#panic": 1000, "#calm": 1000, "#next": 1000, "#claimed": 1000, "#arrived": 10**6} | {
    "#clock": 1000,
}
_NEVER = 4503599627370496
"""The value of #next without timers; see maintenance.lua."""


def set_back_pool(raw: Any, pool: PoolKeys, seconds: int) -> None:
    """Change all times in a pool, as if the server's clock had been set back after they were stored."""
    for name, text in raw.hgetall(pool.state).items():
        if name in _FACTS:
            if text not in ("0", str(_NEVER)):
                raw.hset(pool.state, name, int(text) + seconds * _FACTS[name])
        elif name[0] != "#":
            times = {field: unit for field, unit in _TIMES.items() if records.number(text, field)}
            kind = f"{records.kind_of(text)} " if "=" not in records.kind_of(text) else ""
            moved = {field: int(records.number(text, field)) + seconds * unit for field, unit in times.items()}
            raw.hset(pool.state, name, kind + records.changed(text, **moved) if times else text)
    for key, unit in ((pool.due, 1000), (pool.waitq, 10**6), (pool.ids, 10**6), (pool.checks, 1000), (pool.away, 1000)):
        for member, score in raw.zrange(key, 0, -1, withscores=True):
            raw.zadd(key, {member: score + seconds * unit if score else 0})


def set_back_cache(raw: Any, cache: CacheKeys, seconds: int) -> None:
    """Make a cache look as if the server's clock had been set back by `seconds`.

    The function adds `seconds` to the expiry of each key and to the time of each failed computation. `set_back_pool`
    does this for pools.
    """
    for key in raw.scan_iter(f"{cache.tag}:*"):
        expiry_ms = raw.execute_command("PEXPIRETIME", key)
        if expiry_ms > 0:
            raw.pexpireat(key, expiry_ms + seconds * 1000)
        if key.startswith(cache.lease_prefix) and (failed_ms := raw.hget(key, "failed_ms")):
            raw.hset(key, "failed_ms", int(failed_ms) + seconds * 1000)


def server_ms(raw: Any) -> int:
    """Return the server's time, ms."""
    seconds, micros = raw.time()
    return int(seconds) * 1000 + int(micros) // 1000
