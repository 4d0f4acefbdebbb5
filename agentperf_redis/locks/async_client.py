"""`Lock` and `Semaphore` for asyncio: the same calls, awaited."""

from __future__ import annotations

from types import TracebackType
from typing import NoReturn, Self

from agentperf_redis.locks.flows import Locking


class Facts:
    """What a lock or semaphore knows without I/O. The blocking and the asyncio API share it."""

    _locking: Locking

    @property
    def name(self) -> str:
        """The name of the lock or semaphore."""
        return self._locking.place.name

    @property
    def fence(self) -> int | None:
        """The fencing token of the unit that `release` would release; None when nothing is acquired.

        It rises with every lease. A holder may be paused beyond the end of its lease. A resource is safe from such
        holders if it remembers the highest fencing token and refuses lower ones.
        """
        held = self._locking.newest
        return None if held is None else held.fence

    @property
    def remaining(self) -> float:
        """Seconds for which the lease is valid without a renewal; 0.0 when nothing is held. Does no I/O."""
        return self._locking.remaining


class _AsyncLockable(Facts):
    """The methods that asyncio locks and semaphores share."""

    def __init__(self, locking: Locking) -> None:
        self._locking = locking

    async def acquire(self, *, blocking: bool | None = None, blocking_timeout: float | None = None) -> bool:
        """See `Lock.acquire`."""
        return await self._locking.backend.arun(self._locking.acquire(blocking, blocking_timeout))

    async def release(self) -> None:
        """See `Lock.release`."""
        await self._locking.backend.arun(self._locking.release())

    async def extend(self, additional_time: float, replace_ttl: bool = False) -> bool:
        """See `Lock.extend`."""
        return await self._locking.backend.arun(self._locking.extend(additional_time, replace_ttl))

    async def reacquire(self) -> bool:
        """See `Lock.reacquire`."""
        return await self._locking.backend.arun(self._locking.reacquire())

    async def locked(self) -> bool:
        """See `Lock.locked`."""
        return await self._locking.backend.arun(self._locking.locked())

    async def owned(self) -> bool:
        """See `Lock.owned`."""
        return await self._locking.backend.arun(self._locking.owned())

    async def __aenter__(self) -> Self:
        await self._locking.backend.arun(self._locking.enter())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, GeneratorExit):
            self._locking.abandon()
        else:
            await self._locking.backend.arun(self._locking.leave(error))

    def __enter__(self) -> NoReturn:
        raise TypeError("use `async with`; outside coroutines, `with` on the lock itself instead of its `aio`")

    def __exit__(self, *_: object) -> None:
        """Never called. Without this method, `with` would raise Python's own error, not that of `__enter__`."""


class AsyncLock(_AsyncLockable):
    """`Lock` for asyncio; each method does the same as the method of the same name in `Lock`."""


class AsyncSemaphore(_AsyncLockable):
    """`Semaphore` for asyncio; each method does the same as the method of the same name in `Semaphore`."""
