"""`agentperf version` and `agentperf --version`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from agentperf_redis.cli.console import Exit, out, print_json


def version(*, as_json: bool) -> Exit:
    """Print the version of the library; with `as_json`, also those of Python and of the Redis client."""
    own = _installed("agentperf-redis")
    if as_json:
        print_json(
            "version", {"agentperf_redis": own, "python": platform.python_version(), "redis_py": _installed("redis")}
        )
    else:
        out.print(own)
    return Exit.OK


def _installed(package: str) -> str:
    try:
        return installed(package)
    except PackageNotFoundError:  # the package runs without installation
        return "not installed"
