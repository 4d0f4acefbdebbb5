"""The names of targets: what an alert rule watches."""

from __future__ import annotations

from agentperf_redis.cache.model import KINDS


def cache_target(kind: str, name: str) -> str:
    """Return the target name of a cache, which differs for a tiered cache and an LRU cache of the same name."""
    return name if kind == KINDS["cache"] else f"{name} ({kind})"


def cache_of_target(target: str) -> tuple[str, str]:
    """Return the name and the kind of a cache, given its target name from `cache_target`."""
    kind = KINDS["tiered"]
    name = target.removesuffix(f" ({kind})")
    return name, KINDS["cache"] if name == target else kind
