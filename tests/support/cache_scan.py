"""Scans a cache with plain commands, and reports violations of the invariants of `lua/cache/includes/index.lua`."""

from __future__ import annotations

import time
from typing import Any

from agentperf_redis import keys as key_names
from agentperf_redis.cache import entry_format
from agentperf_redis.cache.model import Settings

_PAYLOAD_AND_EXPIRY = """
local entry = redis.call('GET', KEYS[1])
if not entry then return {-1, -1} end
local without = string.sub(entry, 9, 9) == '.' and 8 or 8 + #string.match(entry, '^%d+ ', 15)
return {#entry - without, redis.call('PEXPIRETIME', KEYS[1])}
"""
"""Returns the size of an entry's payload in bytes (-1 without a value), and its expiry in ms (-1 for never). It is one
script, because an entry may expire between two commands."""
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
    size = {key: entry_format.unpack_size(text)[1] for key, text in raw.hgetall(where.size).items()}
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
    accounted, total = int(meta.get("bytes", 0)), sum(size.values())
    if accounted != total:
        found.append(f"bytes says {accounted}, the entries sum to {total}")
    if settings.max_bytes and total > settings.max_bytes:
        found.append(f"{total} bytes where {settings.max_bytes} are allowed")
    first_ms = int(meta.get("next") or 2**53)
    for key, counted in size.items():
        payload, expiry_ms = raw.eval(_PAYLOAD_AND_EXPIRY, 1, where.entry_prefix + key)
        if payload < 0:
            if time.time() * 1000 < first_ms:  # the server uses the clock of this machine
                found.append(f"{key} has no value, but nothing expires before {first_ms}")
            continue
        if counted != payload + len(key.encode()):
            found.append(f"{key} counts {counted} bytes, and has {payload + len(key.encode())}")
        if 0 <= expiry_ms < first_ms:
            found.append(f"next is {meta.get('next')}, but {key} expires at {expiry_ms}")
    cleared = {key for version in raw.lrange(where.deferred, 0, -1) for key in raw.hkeys(f"{where.deferred}:{version}")}
    stray = {key.removeprefix(where.entry_prefix) for key in raw.scan_iter(match=_literal(where.entry_prefix) + "*")}
    if not stray <= set(size) | cleared:
        found.append(f"values without an entry: {sorted(stray - set(size) - cleared)}")
    return found


def without_value(raw: Any, namespace: str, service: str, name: str) -> list[str]:
    """Return the members of the indexes whose value is missing, because it has expired or the server has dropped it."""
    where = key_names.cache(namespace, service, name)
    members = set(raw.hkeys(where.size))
    for tier in TIERS:
        members |= set(raw.zrange(getattr(where, tier), 0, -1))
    return sorted(key for key in members if not raw.exists(where.entry_prefix + key))


def _literal(text: str) -> str:
    return "".join(f"\\{character}" if character in "*?[]\\" else character for character in text)
