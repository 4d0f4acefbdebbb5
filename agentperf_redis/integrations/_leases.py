"""Leases for decorated functions: the options of a lease, and a decorator for the tasks of a job queue.

If no instance is free, the queue runs the task again later.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypedDict, Unpack

from agentperf_redis import arguments
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import Outcome
from agentperf_redis.balancer.operations import OnLost
from agentperf_redis.errors import InvalidArgument, NoCapacity
from agentperf_redis.random_numbers import fraction

_JITTER = 0.25
"""A task without capacity waits up to this share longer than `retry_after`, so that not all tasks return at once."""


class LeaseOptions(TypedDict, total=False):
    """The options of `LoadBalancer.lease`."""

    wait: float
    priority: int
    require: Collection[str]
    affinity: str | None
    ttl: float
    max_hold: float
    on_lost: OnLost | None
    tokens: int
    fallback: Collection[str]


def check_lease(balancer: LoadBalancer, agent_type: str, options: LeaseOptions) -> None:
    """Check the arguments of a lease, without a request to the server."""
    if not isinstance(balancer, LoadBalancer):
        raise InvalidArgument("balancer", balancer, "a LoadBalancer, such as perf.balancer()")
    balancer.aio.lease(agent_type, **options)


def on_lease(
    balancer: LoadBalancer,
    agent_type: str,
    put_off: Callable[[NoCapacity], Any],
    outcome_of: Callable[[BaseException], Outcome | None],
    **options: Unpack[LeaseOptions],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for functions that run on a leased instance.

    Args:
        balancer: the balancer.
        agent_type: the pool.
        put_off: called instead of the function if no instance is free. It makes the queue run the task again later.
        outcome_of: takes an exception that the function raised and returns the outcome of the lease. If it returns
            None, `LoadBalancer.lease` decides the outcome.
        options: as for `LoadBalancer.lease`.

    Raises:
        InvalidArgument: for invalid options.
    """
    check_lease(balancer, agent_type, options)

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(function):
            raise InvalidArgument("function", function, "a function; the decorator of the task stands above this one")
        place, shown = _without_lease(function)

        def run(lease: Lease, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if place is None:
                return function(*args, **kwargs)
            if len(args) < place:
                return function(*args, **kwargs, lease=lease)
            return function(*args[:place], lease, *args[place:], **kwargs)

        if arguments.is_coroutine_function(function):

            @functools.wraps(function)
            async def leased(*args: Any, **kwargs: Any) -> Any:
                async with contextlib.AsyncExitStack() as stack:
                    try:
                        lease = await stack.enter_async_context(balancer.aio.lease(agent_type, **options))
                    except NoCapacity as error:
                        return put_off(error)
                    with _outcome_of_errors(lease, outcome_of):
                        return await run(lease, args, kwargs)

        else:

            @functools.wraps(function)
            def leased(*args: Any, **kwargs: Any) -> Any:
                with contextlib.ExitStack() as stack:
                    try:
                        lease = stack.enter_context(balancer.lease(agent_type, **options))
                    except NoCapacity as error:
                        return put_off(error)
                    with _outcome_of_errors(lease, outcome_of):
                        return run(lease, args, kwargs)

        leased.__signature__ = shown  # type: ignore[attr-defined]  # unknown to mypy
        return leased

    return decorator


@contextlib.contextmanager
def _outcome_of_errors(lease: Lease, outcome_of: Callable[[BaseException], Outcome | None]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if lease.outcome is None:
            lease.outcome = outcome_of(error)
        raise


def _without_lease(function: Callable[..., Any]) -> tuple[int | None, inspect.Signature]:
    """Return the place of the lease among a function's positional arguments, and the signature without the lease.

    When a task is sent, the queue checks the arguments of the call against this signature. At that time, there is no
    lease yet.

    Returns:
        The place and the signature. The place is None if the function does not take its lease, and `sys.maxsize` if it
        takes its lease only as a keyword.
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)
    if "lease" not in names:
        return None, signature
    place = names.index("lease")
    lease = signature.parameters["lease"]
    others = [each for each in signature.parameters.values() if each is not lease]
    return sys.maxsize if lease.kind is lease.KEYWORD_ONLY else place, signature.replace(parameters=others)


def pause_s(error: NoCapacity) -> float:
    """Return the seconds to wait before a task that found no capacity runs again."""
    return error.retry_after * (1 + _JITTER * fraction())
