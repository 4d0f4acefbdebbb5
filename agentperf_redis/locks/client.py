"""The public API of locks and semaphores: `Lock` and `Semaphore`, and their asyncio counterparts as `aio`."""

from __future__ import annotations

from functools import cached_property
from types import TracebackType
from typing import NoReturn, Self

from agentperf_redis.backend import Backend, chosen_backend
from agentperf_redis.locks.async_client import AsyncLock, AsyncSemaphore, Facts
from agentperf_redis.locks.flows import DEFAULT_TTL_S, checked


class _Lockable(Facts):
    """The methods that locks and semaphores share."""

    def acquire(self, *, blocking: bool | None = None, blocking_timeout: float | None = None) -> bool:
        """Acquire the lock, or a unit of the semaphore. Waiters get it in the order of their arrival.

        Neither a lock nor a unit is reentrant: a second `acquire` in the same thread waits like any other.

        Args:
            blocking: whether to wait; None for the value of the constructor.
            blocking_timeout: max seconds to wait; math.inf for no limit; None for the value of the constructor.

        Returns:
            Whether it was acquired.
        """
        return self._locking.backend.run(self._locking.acquire(blocking, blocking_timeout))

    def release(self) -> None:
        """Release the lock, or the unit that the calling task or thread acquired last.

        If that task or thread has acquired none, release the latest unit that any task or thread acquired through this
        object.

        Raises:
            LockNotOwned: when the lease was lost before.
            LockError: when nothing is acquired.
        """
        self._locking.backend.run(self._locking.release())

    def extend(self, additional_time: float, replace_ttl: bool = False) -> bool:
        """Add time to a lock that has a `timeout`. A lock without a timeout is renewed and needs no extension.

        Args:
            additional_time: seconds, 0.05 to 86,400.
            replace_ttl: whether the time counts from now; otherwise it is added to the time that is left.

        Returns:
            True.

        Raises:
            LockNotOwned: when the lease was lost before.
            LockError: when nothing is acquired, or there is no timeout.
        """
        return self._locking.backend.run(self._locking.extend(additional_time, replace_ttl))

    def reacquire(self) -> bool:
        """Restart the `timeout` of the lock.

        Returns:
            True.

        Raises:
            LockNotOwned: when the lease was lost before.
            LockError: when nothing is acquired, or there is no timeout.
        """
        return self._locking.backend.run(self._locking.reacquire())

    def locked(self) -> bool:
        """Return whether any process holds the lock, or all units of the semaphore are held."""
        return self._locking.backend.run(self._locking.locked())

    def owned(self) -> bool:
        """Return whether, according to the server, this object holds the lock or a unit of the semaphore."""
        return self._locking.backend.run(self._locking.owned())

    def __enter__(self) -> Self:
        self._locking.backend.run(self._locking.enter())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locking.backend.run(self._locking.leave(error))

    async def __aenter__(self) -> NoReturn:
        raise TypeError(f"in a coroutine use `async with {type(self).__name__.lower()}.aio`")

    async def __aexit__(self, *_: object) -> None:
        """Never called. Without this method, `async with` would raise Python's own error, not that of `__aenter__`."""


class Lock(_Lockable):
    """A lock that all processes share: at most one of them holds it.

    The lock is fair, and becomes free when its holder dies. While it is held, it takes less than 700 bytes on the
    server; afterwards it takes none. With an unreliable clock or after a failover, two processes may both believe that
    they hold the lock: see `fence`.

    If this object is garbage-collected or its thread ends before the release, a lock without a `timeout` is released at
    once, with a warning. A lock with a `timeout` stays held until its timeout, as in redis-py. Therefore
    `perf.lock("x", timeout=60).acquire(blocking=False)` succeeds at most once a minute.

    Args:
        name: the name of the lock. Locks and semaphores with the same name are independent.
        timeout: seconds after which the lock is free in any case, as in redis-py. None: a background thread renews the
            lock until it is released, for as long as the process lives.
        blocking: whether `acquire` and `with` wait by default.
        blocking_timeout: max seconds that `acquire` and `with` wait by default; None or math.inf for no limit.
        ttl: applies to a lock without a `timeout`: seconds after which the lock is free if its process died; 0.05 to
            86,400.
        thread_local: whether only the thread that acquired the lock can release it. If not, any thread can.
        raise_on_release_error: whether leaving a `with` block raises LockNotOwned when the lock was lost.
        backend: the server and namespace; None for the process-wide default.
    """

    def __init__(
        self,
        name: str,
        *,
        timeout: float | None = None,
        blocking: bool = True,
        blocking_timeout: float | None = None,
        ttl: float = DEFAULT_TTL_S,
        thread_local: bool = True,
        raise_on_release_error: bool = True,
        backend: Backend | None = None,
    ) -> None:
        self._locking = checked(
            chosen_backend(backend),
            "lock",
            name,
            1,
            timeout=timeout,
            blocking=blocking,
            blocking_timeout=blocking_timeout,
            ttl=ttl,
            thread_local=thread_local,
            raise_on_release_error=raise_on_release_error,
        )

    def __repr__(self) -> str:
        return f"Lock({self.name!r}, backend={self._locking.backend!r})"

    @cached_property
    def aio(self) -> AsyncLock:
        """The same lock for asyncio: every call with I/O is awaited."""
        return AsyncLock(self._locking)


class Semaphore(_Lockable):
    """A semaphore that all processes share: at most `limit` units are held at once.

    It works like `Lock`. It has the additional argument `limit`, but not `thread_local`: any thread can release a unit.

    Args:
        name: the name of the semaphore.
        limit: max units held at once. Each request is sent with this limit, and is granted while fewer units are held.
            So a new limit applies as soon as all processes use it.
        timeout: see `Lock`.
        blocking: see `Lock`.
        blocking_timeout: see `Lock`.
        ttl: see `Lock`.
        raise_on_release_error: see `Lock`.
        backend: the server and namespace; None for the process-wide default.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        *,
        timeout: float | None = None,
        blocking: bool = True,
        blocking_timeout: float | None = None,
        ttl: float = DEFAULT_TTL_S,
        raise_on_release_error: bool = True,
        backend: Backend | None = None,
    ) -> None:
        self._locking = checked(
            chosen_backend(backend),
            "semaphore",
            name,
            limit,
            timeout=timeout,
            blocking=blocking,
            blocking_timeout=blocking_timeout,
            ttl=ttl,
            thread_local=False,
            raise_on_release_error=raise_on_release_error,
        )

    def __repr__(self) -> str:
        return f"Semaphore({self.name!r}, {self.limit}, backend={self._locking.backend!r})"

    @property
    def limit(self) -> int:
        """Max units held at once."""
        return self._locking.limit

    @cached_property
    def aio(self) -> AsyncSemaphore:
        """The same semaphore for asyncio: every call with I/O is awaited."""
        return AsyncSemaphore(self._locking)
