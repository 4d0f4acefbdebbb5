"""Scans a whole cache with plain commands and reports violations of the invariants of `lua/cache/includes/index.lua`."""

from __future__ import annotations

from typing import Any

from agentperf_redis import keys as key_names
from agentperf_redis.cache import entry_format
from agentperf_redis.cache.model import Settings

_PAYLOAD_AND_TTL = """
local entry = redis.call('GET', KEYS[1])
return {entry and #entry - string.match(entry, '^%d+ %d+ ()') + 1 or -1, redis.call('PTTL', KEYS[1])}
"""
"""Returns the size of an entry's payload in bytes (-1 without a value), and its TTL in ms. It is one script, because an
entry may expire between two commands."""
TIERS = ("hot", "warm", "cold", "new")


def faults(raw: Any, namespace: str, service: str, name: str) -> list[str]:
    """Return every violated invariant, in words. Nothing may use the cache during the scan.

    Args:
        raw: a redis client with decode_responses.
        namespace: namespace of the cache.
        service: "cache" or "tiered".
        name: name of the cache.
    """
    settings = Settings.parse(raw.hget(key_names.cache(namespace, service, name).meta, "settings"))
    assert settings is not None
    shards = key_names.cache_shards(namespace, service, name, settings.shards, settings.layout)
    return [fault for where in shards for fault in _faults_in(raw, where)]


def _faults_in(raw: Any, where: key_names.CacheKeys) -> list[str]:
    found: list[str] = []
    meta = raw.hgetall(where.meta)
    settings = Settings.parse(meta["settings"])
    assert settings is not None
    size = {key: int(number) for key, number in raw.hgetall(where.size).items()}
    tiers = {tier: dict(raw.zrange(getattr(where, tier), 0, -1, withscores=True)) for tier in TIERS}
    members = [key for tier in tiers.values() for key in tier]
    if len(members) != len(set(members)):
        found.append("an entry is in two tiers")
    if set(members) != set(size):
        found.append(f"tiers and size differ in {sorted(set(members) ^ set(size))}")
    if len(size) > sum(settings.capacities):
        found.append(f"{len(size)} entries where {sum(settings.capacities)} have capacity")
    for tier, capacity in zip(("hot", "warm"), settings.capacities, strict=False):
        if len(tiers[tier]) > capacity:
            found.append(f"{len(tiers[tier])} entries in {tier}, which has capacity for {capacity}")
    accounted, total = int(meta.get("bytes", 0)), sum(entry_format.unpack_size(number)[1] for number in size.values())
    if accounted != total:
        found.append(f"bytes says {accounted}, the entries sum to {total}")
    if settings.max_bytes and total > settings.max_bytes:
        found.append(f"{total} bytes where {settings.max_bytes} are allowed")
    expiries = dict(raw.zrange(where.exp, 0, -1, withscores=True))
    if not set(expiries) <= set(size):
        found.append(f"expiries without entries: {sorted(set(expiries) - set(size))}")
    if expiries and not (meta.get("next") and int(meta["next"]) <= min(expiries.values())):
        found.append(f"next is {meta.get('next')}, but an entry expires at {min(expiries.values())}")
    for key, number in size.items():
        payload, left_ms = raw.eval(_PAYLOAD_AND_TTL, 1, where.entry_prefix + key)
        if payload < 0:
            if key not in expiries:
                found.append(f"{key} has no value, and does not expire")
            continue
        _, counted = entry_format.unpack_size(number)
        if counted != payload + len(key.encode()):
            found.append(f"{key} counts {counted} bytes, and has {payload + len(key.encode())}")
        if (left_ms >= 0) != (key in expiries):
            found.append(f"{key}: its expiry and its score in exp differ")
    cleared = {key for version in raw.lrange(where.deferred, 0, -1) for key in raw.hkeys(f"{where.deferred}:{version}")}
    stray = {key.removeprefix(where.entry_prefix) for key in raw.scan_iter(match=_literal(where.entry_prefix) + "*")}
    if not stray <= set(size) | cleared:
        found.append(f"values without an entry: {sorted(stray - set(size) - cleared)}")
    return found


def without_value(raw: Any, namespace: str, service: str, name: str, since_ms: float) -> list[str]:
    """Return the index members whose value the server has dropped, or whose value expired before `since_ms`."""
    where = key_names.cache(namespace, service, name)
    members = {*raw.hkeys(where.size), *raw.zrange(where.exp, 0, -1)}
    for tier in TIERS:
        members |= set(raw.zrange(getattr(where, tier), 0, -1))
    gone = (key for key in members if not raw.exists(where.entry_prefix + key))
    expiries = {key: raw.zscore(where.exp, key) for key in gone}
    return sorted(key for key, expiry_ms in expiries.items() if expiry_ms is None or expiry_ms <= since_ms)


def _literal(text: str) -> str:
    return "".join(f"\\{character}" if character in "*?[]\\" else character for character in text)
