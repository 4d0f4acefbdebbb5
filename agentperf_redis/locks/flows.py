"""Flows for locks and semaphores: acquire, wait, release, extend."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.balancer.flows.queue import LIVE_MS
from agentperf_redis.balancer.flows.undoing import or_undo
from agentperf_redis.balancer.model import MAX_TTL_S, MIN_TTL_S
from agentperf_redis.command import Flow, Wait, WakeUp
from agentperf_redis.errors import BackendUnavailable, LockError, LockNotOwned
from agentperf_redis.locks import commands
from agentperf_redis.locks.commands import Place, Spent, Taken
from agentperf_redis.locks.keeper import Held, LockKeeper, caller, lock_keeper_of
from agentperf_redis.transport.exchange import CLOSED

_log = logging.getLogger("agentperf_redis")

DEFAULT_TTL_S = 30.0
_NEW_TOKENS = 3
"""Max tokens that one call may try. A call needs another token if its lease expires before the reply arrives."""
_MIN_WAIT_S = 0.002
_additions = itertools.count(1)
"""Numbers the calls of this process that add time to a lease."""


class _Local(threading.local):
    """The units that one thread holds through one object, the newest last."""

    def __init__(self) -> None:
        self.units: list[Held] = []


class _Shared:
    """The units that all threads hold through one object, the newest last."""

    def __init__(self) -> None:
        self.units: list[Held] = []


@dataclass(frozen=True, slots=True)
class Locking:
    """The operations of one lock or semaphore object, shared by its blocking and asyncio APIs.

    Attributes:
        backend: the server and namespace.
        keeper: renews this process's leases on the backend.
        place: the lock or semaphore.
        limit: max units held at once by all processes.
        timeout: seconds after which the lease ends without renewal. None: the lease is renewed until it is released.
        ttl: seconds after which the lease expires if its process dies.
        blocking: whether `acquire` waits by default.
        blocking_timeout: max seconds that `acquire` waits by default; None for no limit.
        raise_on_release_error: whether leaving a `with` block raises LockNotOwned.
        holder: the units acquired through this object: for each thread separately, or for all threads together.
    """

    backend: Backend
    keeper: LockKeeper
    place: Place
    limit: int
    timeout: float | None
    ttl: float
    blocking: bool
    blocking_timeout: float | None
    raise_on_release_error: bool
    holder: _Local | _Shared = field(compare=False)

    @property
    def newest(self) -> Held | None:
        """The newest unit of the calling task or thread; if it has none, the newest unit of all; None without units.

        Tasks and threads may share this object. If the lease of one task has expired, another task may already hold the
        lock. The first task must not release that task's lock.
        """
        units, me = list(self.holder.units), caller()
        return next((held for held in reversed(units) if held.owner() is me), units[-1] if units else None)

    @property
    def remaining(self) -> float:
        """Seconds for which the newest unit is valid without a renewal."""
        held = self.newest
        return max(0.0, held.valid_until - time.monotonic()) if held is not None and self.keeper.holds(held) else 0.0

    def acquire(self, blocking: bool | None, blocking_timeout: float | None) -> Flow[bool]:
        """See `Lock.acquire`."""
        is_blocking = self.blocking if blocking is None else arguments.flag("blocking", blocking)
        if blocking_timeout is None:
            limit = math.inf if self.blocking_timeout is None else self.blocking_timeout
        else:
            limit = _wait(blocking_timeout)
        return self._acquire(limit if is_blocking else 0.0)

    def enter(self) -> Flow[None]:
        """Acquire a unit for a `with` block, or raise LockError."""
        if not (yield from self.acquire(None, None)):
            raise LockError(self.place.name, "it was not free in time")
        held = self.newest
        if held is not None:
            held.in_block = True

    def _acquire(self, wait: float) -> Flow[bool]:
        until = time.monotonic() + wait
        ticket = commands.NO_TICKET
        in_queue = False
        for _ in range(_NEW_TOKENS):
            token = self.keeper.token()
            undoing = partial(commands.release, self.place, token, tombstone_ms=self.keeper.tombstone_ms())
            if not in_queue:
                sent_at = time.monotonic()
                first = yield from or_undo(
                    self.keeper.leases,
                    undoing,
                    self.ttl,
                    iter(commands.acquire(self.place, token, ttl=self.ttl, limit=self.limit)),
                )
                if isinstance(first, Taken):
                    yield from self._hold(token, first, sent_at)
                    return True
                if isinstance(first, Spent):
                    continue
                if wait <= 0:
                    return False
                in_queue = True
            waiting = self._wait(token, ticket, until)
            answer, sent_at, ticket = yield from or_undo(self.keeper.leases, undoing, self.ttl, waiting, in_queue=True)
            if isinstance(answer, Taken):
                yield from self._hold(token, answer, sent_at)
                return True
            if answer is None:
                return False
        raise LockNotOwned(self.place.name, f"{_NEW_TOKENS} leases in a row expired before the reply arrived")

    def _wait(self, token: str, ticket: str, until: float) -> Flow[tuple[Taken | Spent | None, float, str]]:
        """Wait in the queue. Returns the answer, the time of the request for it, and the position in the queue."""
        wake_up = WakeUp()
        name = token.encode()

        def on_message(message: bytes) -> None:
            if message == name:
                wake_up.send()

        subscription = self.backend.bus.subscribe(self.place.keys.queue, on_message, wake_up.send)
        try:
            while True:
                wake_up.reset()
                sent_at = time.monotonic()
                answer = yield from commands.acquire(
                    self.place, token, ttl=self.ttl, limit=self.limit, live_ms=LIVE_MS, ticket=ticket
                )
                if isinstance(answer, (Taken, Spent)):
                    return answer, sent_at, ticket
                ticket = answer.ticket
                left = until - time.monotonic()
                if left <= 0:
                    yield from commands.release(self.place, token)
                    return None, sent_at, ticket
                yield from Wait(wake_up, min(left, max(_MIN_WAIT_S, answer.retry_after)))
        finally:
            subscription.close()

    def _hold(self, token: str, taken: Taken, sent_at: float) -> Flow[None]:
        held = Held(
            self.place,
            token,
            taken.fence,
            ttl=self.ttl,
            sent_at=sent_at,
            left=taken.left,
            renewed=self.timeout is None,
        )
        if not self.keeper.hold(held):
            yield from commands.release(self.place, token)
            raise BackendUnavailable(self.backend.address.masked, "not_applied", CLOSED)
        for each in list(self.holder.units):
            if each.is_abandoned:  # callers may let a lease end at its timeout instead of releasing it
                self.keeper.end(each)
                self._remove(each)
        self.holder.units.append(held)

    def release(self) -> Flow[None]:
        """See `Lock.release`."""
        held = self._pop()
        if held is None:
            raise LockError(self.place.name, "it is not acquired, so it cannot be released")
        return self._release(held)

    def _pop(self) -> Held | None:
        while (held := self.newest) is not None:
            if self._remove(held):
                return held
        return None

    def _remove(self, held: Held) -> bool:
        try:
            self.holder.units.remove(held)
        except ValueError:  # another thread has removed it
            return False
        return True

    def _release(self, held: Held) -> Flow[None]:
        if not self.keeper.end(held):
            raise held.lost or LockNotOwned(held.place.name, "another process holds it, or the client was closed")
        command = commands.release(held.place, held.token)
        answered = False
        try:
            freed = yield from command
            answered = True
        finally:
            if not answered:  # the caller will not retry, so the keeper retries; releasing twice is harmless
                self.keeper.leases.retry_in_background(command, held.ttl)
        if not freed:
            raise LockNotOwned(held.place.name, "it expired before it was released, or another caller released it")

    def leave(self, error: BaseException | None) -> Flow[None]:
        """End a `with` block."""
        held = self._pop()
        if held is None:  # released within the block
            if error is None and self.raise_on_release_error:
                raise LockError(self.place.name, "it was released within its `with` block")
            return
        try:
            yield from self._release(held)
        except LockNotOwned as lost:
            if error is None and self.raise_on_release_error:
                raise
            _log.warning("%s", lost)
        except BackendUnavailable as unavailable:
            # The work is done, so no error is raised. A retry in the background releases the lease, or the lease
            # expires.
            _log.warning("could not release %r: %s", held, unavailable)

    def abandon(self) -> None:
        """Release the newest unit in the background. The caller's coroutine is being destroyed and cannot await."""
        held = self._pop()
        if held is not None and self.keeper.end(held):
            self.keeper.leases.retry_in_background(commands.release(held.place, held.token), held.ttl)

    def extend(self, additional_time: float, replace_ttl: bool) -> Flow[bool]:
        """See `Lock.extend`."""
        seconds = _ttl("additional_time", additional_time)
        added = not arguments.flag("replace_ttl", replace_ttl)
        return self._extend(seconds, added, "extended")

    def reacquire(self) -> Flow[bool]:
        """See `Lock.reacquire`."""
        return self._extend(self.ttl, False, "reacquired")

    def _extend(self, seconds: float, added: bool, done: str) -> Flow[bool]:
        held = self.newest
        if held is None:
            raise LockError(self.place.name, f"it is not acquired, so it cannot be {done}")
        if held.renewed:
            raise LockError(self.place.name, f"it has no timeout and is renewed, so it cannot be {done}")
        if not self.keeper.holds(held):
            raise held.lost or LockNotOwned(held.place.name, "another process holds it, or the client was closed")
        sent_at = time.monotonic()
        left = yield from commands.extend(held.place, held.token, seconds, added=next(_additions) if added else 0)
        if left is None:
            self.keeper.lose(held, "it has expired, or another caller released it")
            raise held.lost or LockNotOwned(held.place.name, "it was released meanwhile")
        held.valid(sent_at, left)
        return True

    def locked(self) -> Flow[bool]:
        """See `Lock.locked`."""
        seen = yield from commands.look(self.place)
        return seen.held >= self.limit

    def owned(self) -> Flow[bool]:
        """See `Lock.owned`."""
        held = self.newest
        if held is None or not self.keeper.holds(held):
            return False
        seen = yield from commands.look(held.place, held.token)
        return seen.left > 0


def checked(
    backend: Backend,
    service: str,
    name: str,
    limit: int,
    *,
    timeout: float | None,
    blocking: bool,
    blocking_timeout: float | None,
    ttl: float,
    thread_local: bool,
    raise_on_release_error: bool,
) -> Locking:
    """Check the arguments of a lock or semaphore, and return its operations."""
    seconds = None if timeout is None else _ttl("timeout", timeout)
    make: Callable[[], _Local | _Shared] = _Local if arguments.flag("thread_local", thread_local) else _Shared
    return Locking(
        backend,
        lock_keeper_of(backend),
        Place.of(backend.namespace, service, arguments.name("name", name)),
        arguments.count("limit", limit),
        seconds,
        _ttl("ttl", ttl) if seconds is None else seconds,
        arguments.flag("blocking", blocking),
        None if blocking_timeout is None else _wait(blocking_timeout),
        arguments.flag("raise_on_release_error", raise_on_release_error),
        make(),
    )


def _ttl(argument: str, value: float) -> float:
    return arguments.seconds(argument, value, minimum=MIN_TTL_S, maximum=MAX_TTL_S)


def _wait(value: float) -> float:
    return arguments.seconds("blocking_timeout", value, minimum=0.0, endless=True)
