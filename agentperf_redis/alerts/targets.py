"""The names of targets: what an alert rule watches."""

from __future__ import annotations

from agentperf_redis.cache.model import KINDS


def cache_target(kind: str, name: str) -> str:
    """Return the name of a cache as a target: it also tells a tiered cache from an LRU cache of the same name."""
    return name if kind == KINDS["cache"] else f"{name} ({kind})"


def cache_of_target(target: str) -> tuple[str, str]:
    """Return name and kind of the cache that `cache_target` names."""
    kind = KINDS["tiered"]
    name = target.removesuffix(f" ({kind})")
    return name, KINDS["cache"] if name == target else kind
