"""Release what an interrupted flow may have acquired."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.command import Batch, Command, Flow, Wait
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, ScriptFailed

T = TypeVar("T")

_CANCELLED_WAIT_S = 0.25
"""How long a cancelled caller waits for the release of its lease, s. A slower release continues in the background."""


def or_undo(
    keeper: LeaseKeeper,
    undoing: Callable[[], Command[bool] | Batch[bool]],
    ttl: float,
    acquiring: Flow[T],
    *,
    in_queue: bool = False,
) -> Flow[T]:
    """Run the flow that acquires a lease with a token, or several leases with a token each.

    If `acquiring` is interrupted at any point, the tokens are released, so that no lease or queue entry is left behind.

    Args:
        keeper: the lease keeper, which retries the release.
        undoing: returns the command that releases the token, or the commands for all tokens.
        ttl: TTL of the lease, s.
        acquiring: the flow.
        in_queue: whether the token may be in the queue. If so, it must be released even if the last call had no effect.
    """
    interrupted = True
    try:
        answer = yield from acquiring
        interrupted = False
        return answer
    except AgentPerfError as error:
        interrupted = False
        # If the script failed midway, or its reply could not be decoded, the script may still have granted a lease.
        known = isinstance(error, BackendUnavailable) and error.outcome == "not_applied"
        if in_queue or (isinstance(error, (BackendUnavailable, CorruptState, ScriptFailed)) and not known):
            keeper.undo(undoing(), ttl)
        raise
    except GeneratorExit:  # the event loop is shutting down, so this flow can do no further I/O
        interrupted = False
        keeper.undo(undoing(), ttl)
        raise
    except asyncio.CancelledError:
        # The caller may be out of time, and the server may be unreachable. So wait only briefly, not for a whole
        # deadline.
        interrupted = False
        yield from Wait(keeper.undo(undoing(), ttl), _CANCELLED_WAIT_S)
        raise
    finally:
        if interrupted:
            try:
                yield from undoing()
            except AgentPerfError:
                keeper.undo(undoing(), ttl)
