"""Cancels requests whose caller was interrupted, so that no copy of them is executed later."""

from __future__ import annotations

from contextlib import suppress

from agentperf_redis.cache import commands
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.command import Flow
from agentperf_redis.errors import AgentPerfError


def cancel_requests(shard: Shard, error: BaseException, requests: tuple[str, ...], until_ms: int) -> Flow[None]:
    """After an interruption (cancelled task, Ctrl-C), cancel requests in flight, so that none undoes a later change.

    If the server is unreachable, nothing needs to be cancelled: the error is raised at the end of the deadline, and
    from then on the server refuses all copies of the requests.
    """
    if not isinstance(error, (AgentPerfError, GeneratorExit)):
        with suppress(AgentPerfError):
            yield from commands.cancel_puts(shard.keys, requests, until_ms)
