"""Active checks: processes ask the server what is due, check that, and say how it went.

There is no leader. The server hands out each check once, to whoever asks first, an interval after the one before. Any
number of processes share the work so, and one that dies leaves out, once, the checks it had taken on.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from agentperf_redis.backend import Backend
from agentperf_redis.background import Background
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Claimed, Pool
from agentperf_redis.balancer.model import AgentInstance
from agentperf_redis.balancer.server_clock import ServerClock
from agentperf_redis.command import Call, Flow
from agentperf_redis.errors import AgentPerfError, InvalidArgument

_log = logging.getLogger("agentperf_redis")

AT_ONCE = 8
"""Checks that a process takes on together: so few that others have some, too."""
_RETRY_S = 0.5
_MIN_PAUSE_S = 0.005


@dataclass(frozen=True, slots=True)
class Checking:
    """What is to be checked, and how.

    Attributes:
        backend: the server and namespace.
        clock: of the servers.
        pool: whose instances.
        check: says how an instance is, by what it returns or raises.
        interval: seconds from one check of an instance to its next.
        timeout: seconds that a check may take.
    """

    backend: Backend
    clock: ServerClock
    pool: Pool
    check: Callable[[AgentInstance], object]
    interval: float
    timeout: float
    _raising: set[str] = field(default_factory=set, init=False, repr=False)
    """Instances whose last check here raised."""

    def claim(self) -> Flow[Claimed]:
        """Take on what is due."""
        return (yield from commands.claim_checks(self.pool, math.ceil(self.interval * 1000), AT_ONCE))

    def report(self, claimed: Claimed, results: Mapping[str, bool]) -> Flow[None]:
        """Say how it went."""
        told = list(results.items())
        request = partial(commands.report_checks, self.pool, claimed.at_ms, told)
        yield from self.clock.before_deadline(self.pool, request)

    def failed(self, instance: AgentInstance, why: object) -> None:
        """Note why a check failed."""
        _log.debug("check of %s of %s failed: %s", instance.id, self.pool.agent_type, why)

    def raised(self, instance: AgentInstance, error: Exception) -> None:
        """Note that a check raised: aloud when no other does, since it may be the check that is broken."""
        if self._raising:
            self.failed(instance, error)
        else:
            _log.warning(
                "the check of %s of %s raised, so it counts as not well; what else raises is told at DEBUG level until "
                "nothing does",
                instance.id,
                self.pool.agent_type,
                exc_info=error,
            )
        self._raising.add(instance.id)

    def answered(self, instance: AgentInstance) -> None:
        """Note that a check went through, whatever it said."""
        self._raising.discard(instance.id)


class _Rounds:
    """What threads and tasks that check do again and again.

    Args:
        checking: what, and how.
        check_all: checks instances at the same time, and returns by id whether each is well; awaited under asyncio.
        ended: whether there is nobody any more to try again for.
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
        self._troubled = False

    def next(self) -> Flow[float]:
        """Check what is due. Returns after how many seconds to ask again.

        Raises:
            AgentPerfError: the server could not be asked, and there is nobody to try again for.
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
            if not self._troubled:
                _log.warning("checks of %s are interrupted: %s", checking.pool.agent_type, error)
            self._troubled = True
            return _RETRY_S
        if self._troubled:
            _log.warning("checks of %s go on", checking.pool.agent_type)
        self._troubled = False
        return 0.0 if len(claimed.instances) == AT_ONCE else max(_MIN_PAUSE_S, claimed.next_after)


class Checks:
    """Checks the instances of a pool on a background thread, until stopped. Not in a process that forks off this one.

    Args:
        checking: what, and how.
    """

    def __init__(self, checking: Checking) -> None:
        if inspect.iscoroutinefunction(checking.check):
            raise InvalidArgument(
                "check", checking.check, "a plain function here; in a coroutine, lb.aio.run_checks(...)"
            )
        self._checking = checking
        self._jobs = Background("agentperf-checks")
        self._hanging: set[str] = set()
        self._rounds = _Rounds(checking, self._check_all, lambda: self._jobs.closing)
        checking.backend.on_close(self.stop)
        self._jobs.put(self._round)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"Checks({self._checking.pool.agent_type!r}, {state})"

    @property
    def running(self) -> bool:
        """Whether this process checks: not after `stop`, and not in a child that got this object by a fork."""
        return self._jobs.running and not self._jobs.closing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Check no more; what is being checked is finished first, within its timeout."""
        self._checking.backend.off_close(self.stop)
        self._jobs.close(self._checking.timeout + 1.0)

    def _round(self) -> None:
        if self._jobs.closing:
            return
        pause = _RETRY_S
        try:
            pause = self._checking.backend.run(self._rounds.next())
        except AgentPerfError:  # stopped meanwhile
            return
        finally:
            self._jobs.at(time.monotonic() + pause, self._round)

    def _check_all(self, instances: tuple[AgentInstance, ...]) -> dict[str, bool]:
        """Check all at once, each on a thread of its own: one that hangs holds up no other.

        They are not background jobs: each may hang for good, and then its thread stays behind.
        """
        results = {instance.id: False for instance in instances}
        answers: SimpleQueue[tuple[str, bool]] = SimpleQueue()
        asked = 0
        for instance in instances:
            if instance.id in self._hanging:  # since an earlier check
                self._checking.failed(instance, "the check before still runs")
                continue
            self._hanging.add(instance.id)
            asked += 1
            threading.Thread(target=self._check_one, args=(instance, answers), daemon=True).start()
        until = time.monotonic() + self._checking.timeout
        for _ in range(asked):
            try:
                name, good = answers.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            results[name] = good
        return results

    def _check_one(self, instance: AgentInstance, answers: SimpleQueue[tuple[str, bool]]) -> None:
        good = False
        try:
            good = self._checking.check(instance) is not False
            self._checking.answered(instance)
        except Exception as error:  # noqa: BLE001  whatever it is, it says that the instance is not well
            self._checking.raised(instance, error)
        finally:
            self._hanging.discard(instance.id)
            answers.put((instance.id, good))


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
        checking.answered(instance)
        return answer is not False
    except Exception as error:  # noqa: BLE001  as in Checks
        (checking.failed if limit.expired() else checking.raised)(instance, error)
        return False
