"""Active checks: processes claim due checks from the server, run them, and report the results.

There is no leader, and any number of processes can share the work. A due check goes to the first process that claims
it; the next check of the same instance is due one interval later. When a process dies, each instance whose check it
had claimed misses one check.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from agentperf_redis import arguments, random_numbers
from agentperf_redis.backend import Backend
from agentperf_redis.background import BackgroundTask
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Claimed, Pool
from agentperf_redis.balancer.layouts import Layout, layouts_of, over_shards
from agentperf_redis.balancer.model import AgentInstance
from agentperf_redis.balancer.server_clock import ServerClock
from agentperf_redis.command import Call, Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument

_log = logging.getLogger("agentperf_redis")

AT_ONCE = 8
"""Max checks that a process claims at once: small enough to leave some for other processes."""
_RETRY_S = 0.5
_MIN_PAUSE_S = 0.005


@dataclass(frozen=True, slots=True)
class Claims:
    """The checks that a process claimed in one round, by shard."""

    parts: tuple[tuple[Pool, Claimed], ...]

    @property
    def instances(self) -> tuple[AgentInstance, ...]:
        """The instances to check."""
        return tuple(itertools.chain.from_iterable(claimed.instances for _, claimed in self.parts))

    @property
    def next_after(self) -> float:
        """Seconds until the next check is due."""
        return min(claimed.next_after for _, claimed in self.parts)

    @property
    def is_nothing(self) -> bool:
        """Whether no check was due."""
        return not self.instances


@dataclass(frozen=True, slots=True)
class Checking:
    """The parameters of the checks of one pool. The methods claim and report checks, and log failures.

    Attributes:
        backend: the server and namespace.
        clock: estimates of the servers' clocks.
        pool: the pool whose instances are checked.
        check: the user's function; a check fails when the function returns False or raises.
        interval: seconds from one check of an instance to the next.
        timeout: max seconds of one check.
    """

    backend: Backend
    clock: ServerClock
    pool: Pool
    check: Callable[[AgentInstance], object]
    interval: float
    timeout: float
    _raising: set[str] = field(default_factory=set, init=False, repr=False)
    """Instances whose last check in this process raised an exception."""

    def claim(self) -> Flow[Claims]:
        """Claim due checks, at most `AT_ONCE`."""
        return (yield from over_shards(layouts_of(self.backend), self.pool, self._claim_in, lambda it: it.is_nothing))

    def _claim_in(self, layout: Layout) -> Flow[Claims]:
        parts = []
        left = AT_ONCE
        away: BackendUnavailable | None = None
        first = random_numbers.bits(16)  # each round begins with a random shard
        for number in range(len(layout.shards)):
            shard = layout.shards[(first + number) % len(layout.shards)]
            if away is not None and layout.is_away(shard):  # wait only once for a node that does not answer
                continue
            try:
                claimed = yield from commands.claim_checks(shard, math.ceil(self.interval * 1000), left)
            except BackendUnavailable as error:  # the checks of the other shards go on
                layout.lose(shard)
                away = error
                continue
            parts.append((shard, claimed))
            left -= len(claimed.instances)
            if left <= 0:
                break
        if away is not None and not parts:
            raise away
        return Claims(tuple(parts))

    def report(self, claims: Claims, results: Mapping[str, bool]) -> Flow[None]:
        """Report the results of claimed checks. If a shard is unreachable, report to the other shards, then raise."""
        away: BackendUnavailable | None = None
        for shard, claimed in claims.parts:
            reports = [(each.id, results[each.id]) for each in claimed.instances if each.id in results]
            if reports:
                request = partial(commands.report_checks, shard, claimed.at_ms, reports)
                try:
                    yield from self.clock.before_deadline(shard, request)
                except BackendUnavailable as error:
                    away = error
        if away is not None:
            raise away

    def failed(self, instance: AgentInstance, why: object) -> None:
        """Log the reason why a check failed."""
        _log.debug("check of %s of %s failed: %s", instance.id, self.pool.agent_type, why)

    def raised(self, instance: AgentInstance, error: Exception) -> None:
        """Log that a check raised an exception.

        The first exception is logged as a warning, since the check function itself may be broken. Further exceptions
        are logged at DEBUG level until the most recent check of each instance has returned without an exception.
        """
        if self._raising:
            self.failed(instance, error)
        else:
            _log.warning(
                "the check of %s of %s raised and counts as failed; further exceptions are logged at DEBUG level until "
                "no check raises",
                instance.id,
                self.pool.agent_type,
                exc_info=error,
            )
        self._raising.add(instance.id)

    def passed(self, instance: AgentInstance, answer: object) -> bool:
        """Record that a check returned without an exception, and return whether it passed.

        Raises:
            InvalidArgument: the answer is a generator: the body of the check has not run.
        """
        arguments.refuse_unfinished("check", self.check, answer)
        self._raising.discard(instance.id)
        return answer is not False


class _Rounds:
    """Runs rounds of claiming, checking and reporting; used by both the blocking and the asyncio API.

    Args:
        checking: the checks to run.
        check_all: checks instances concurrently, and returns a mapping from instance id to whether the check passed.
            Under asyncio, it returns an awaitable of this mapping.
        ended: returns whether the checks were stopped. A round that fails before the stop is retried. A round that
            fails after the stop raises its error.
    """

    def __init__(
        self,
        checking: Checking,
        check_all: Callable[[tuple[AgentInstance, ...]], Mapping[str, bool] | Awaitable[Mapping[str, bool]]],
        ended: Callable[[], bool],
    ) -> None:
        self._checking = checking
        self._check_all = check_all
        self._ended = ended
        self._interrupted = False

    def next(self) -> Flow[float]:
        """Run one round: claim and run due checks, and report the results. Returns the seconds until the next round.

        Raises:
            AgentPerfError: when a request fails after the checks have stopped.
        """
        checking = self._checking
        try:
            claimed = yield from checking.claim()
            if claimed.instances:
                results: Mapping[str, bool] = yield Call(partial(self._check_all, claimed.instances))
                yield from checking.report(claimed, results)
        except AgentPerfError as error:
            if self._ended():
                raise
            if not self._interrupted:
                _log.warning("checks of %s are interrupted: %s", checking.pool.agent_type, error)
            self._interrupted = True
            return _RETRY_S
        if self._interrupted:
            _log.warning("checks of %s continue", checking.pool.agent_type)
        self._interrupted = False
        return 0.0 if len(claimed.instances) == AT_ONCE else max(_MIN_PAUSE_S, claimed.next_after)


class Checks(BackgroundTask):
    """Checks the instances of a pool on background threads until stopped. A forked child does not continue the checks.

    Args:
        checking: the checks to run.
    """

    def __init__(self, checking: Checking) -> None:
        if arguments.is_coroutine_function(checking.check):
            raise InvalidArgument(
                "check", checking.check, "a plain function here; in a coroutine, lb.aio.run_checks(...)"
            )
        self._checking = checking
        super().__init__("agentperf-checks")
        self._hanging: set[str] = set()
        self._rounds = _Rounds(checking, self._check_all, lambda: self._jobs.closing)
        checking.backend.on_close(self.stop)
        self._jobs.put(self._round)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"Checks({self._checking.pool.agent_type!r}, {state})"

    def stop(self) -> None:
        """Stop the checks. Waits for running checks to finish, for at most the timeout of a check plus one second."""
        self._jobs.close(self._checking.timeout + 1.0)
        self._checking.backend.off_close(self.stop)

    def _round(self) -> None:
        if self._jobs.closing:
            return
        pause = _RETRY_S
        try:
            pause = self._checking.backend.run(self._rounds.next())
        except AgentPerfError:  # raised only after the checks were stopped
            return
        finally:
            self._jobs.at(time.monotonic() + pause, self._round)

    def _check_all(self, instances: tuple[AgentInstance, ...]) -> dict[str, bool]:
        """Check all instances concurrently, each on its own thread, so that a hanging check does not delay the others.

        A thread whose check hangs keeps running after the timeout. All these threads are daemon threads, so they do not
        keep the process from ending.
        """
        results = {instance.id: False for instance in instances}
        answers: SimpleQueue[tuple[str, bool]] = SimpleQueue()
        started = 0
        for instance in instances:
            if instance.id in self._hanging:  # an earlier check has not returned yet
                self._checking.failed(instance, "its previous check is still running")
                continue
            self._hanging.add(instance.id)
            try:
                threading.Thread(target=self._check_one, args=(instance, answers), daemon=True).start()
            except RuntimeError as error:  # no thread can start, which says nothing about the instance
                self._checking.failed(instance, error)
                self._hanging.discard(instance.id)
                del results[instance.id]
            else:
                started += 1
        until = time.monotonic() + self._checking.timeout
        for _ in range(started):
            try:
                name, good = answers.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            results[name] = good
        return results

    def _check_one(self, instance: AgentInstance, answers: SimpleQueue[tuple[str, bool]]) -> None:
        good = False
        try:
            answer = self._checking.check(instance)
            if inspect.isawaitable(answer):  # a plain function may return an awaitable, as some clients' methods do
                answer = asyncio.run(_result_of(answer))
            good = self._checking.passed(instance, answer)
        except Exception as error:  # noqa: BLE001  any exception is a failed check
            self._checking.raised(instance, error)
        finally:
            self._hanging.discard(instance.id)
            answers.put((instance.id, good))


async def _result_of(awaitable: Awaitable[object]) -> object:
    return await awaitable


async def run_checks(checking: Checking) -> None:
    """Check the instances of a pool in this task, until it is cancelled."""

    async def check_all(instances: tuple[AgentInstance, ...]) -> dict[str, bool]:
        results = await asyncio.gather(*(_check(checking, instance) for instance in instances))
        return {instance.id: good for instance, good in zip(instances, results, strict=True)}

    rounds = _Rounds(checking, check_all, lambda: checking.backend.closed)
    while True:
        pause = await checking.backend.arun(rounds.next())
        await asyncio.sleep(pause)


async def _check(checking: Checking, instance: AgentInstance) -> bool:
    limit = asyncio.timeout(checking.timeout)
    try:
        async with limit:
            answer = checking.check(instance)
            if inspect.isawaitable(answer):
                answer = await answer
        return checking.passed(instance, answer)
    except Exception as error:  # noqa: BLE001  any exception is a failed check
        (checking.failed if limit.expired() else checking.raised)(instance, error)
        return False
