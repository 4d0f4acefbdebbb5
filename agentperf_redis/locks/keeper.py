"""Renews the leases of this process on locks and semaphores, on the thread that renews the balancer's leases."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from functools import partial
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.background import register_for_fork
from agentperf_redis.balancer.lease_keeper import LeaseKeeper, lease_keeper_of
from agentperf_redis.command import Batch
from agentperf_redis.errors import AgentPerfError, LockNotOwned
from agentperf_redis.locks import commands
from agentperf_redis.locks.commands import Place

_log = logging.getLogger("agentperf_redis")

_AT_ONCE = 200
"""Renewals in one pipeline."""
_AHEAD = 0.1
"""When a lease is renewed, leases that become due within this share of their TTL are renewed in the same pipeline."""
_MAX_TOKEN_PROCESS = 48
"""Maximum number of characters of a process's name in a token. It keeps a token below 64 bytes, because Redis stores
short texts compactly. Long host names, as in a Kubernetes cluster, are cut at the front, since they differ at the
end."""
TOMBSTONE_S = 50.0
"""How long the server refuses the token of an abandoned request, s. After a minute, no key of the request is left."""


def caller() -> asyncio.Task[Any] | threading.Thread:
    """Return the asyncio task that is running, or the thread if there is none."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.current_thread() if task is None else task


class Held:
    """One unit of a lock or semaphore that this process holds, as long as the keeper knows the token of the unit.

    Attributes:
        place: the lock or semaphore.
        token: identifies the lease on the server.
        fence: fencing token, which rises with every lease.
        ttl: seconds after which the lease expires unless it is renewed.
        renewed: whether the keeper renews the lease.
        valid_until: end of the lease, by time.monotonic. It counts from the time when a request was sent, so this
            process regards the lease as ended no later than the server does.
        renew_at: when the lease is renewed next.
        lost: why the lease is lost, or None.
        owner: the asyncio task or thread that acquired the unit.
        in_block: whether a `with` block will release the unit.
    """

    __slots__ = (
        "__weakref__",
        "fence",
        "in_block",
        "lost",
        "owner",
        "place",
        "renew_at",
        "renewed",
        "token",
        "ttl",
        "valid_until",
    )

    def __init__(
        self, place: Place, token: str, fence: int, *, ttl: float, sent_at: float, left: float, renewed: bool
    ) -> None:
        self.place = place
        self.token = token
        self.fence = fence
        self.ttl = ttl
        self.renewed = renewed
        self.lost: LockNotOwned | None = None
        self.owner = weakref.ref(caller())
        self.in_block = False
        self.valid(sent_at, left)

    def __repr__(self) -> str:
        return f"Held({self.place.name!r}, token={self.token!r})"

    @property
    def is_abandoned(self) -> bool:
        """Whether the lease has ended at its timeout, and its owner either is the caller or has ended too."""
        if self.renewed or self.in_block or time.monotonic() < self.valid_until:
            return False
        owner = self.owner()
        if owner is None or owner is caller():
            return True
        return not owner.is_alive() if isinstance(owner, threading.Thread) else owner.done()

    def valid(self, sent_at: float, left: float) -> None:
        """Record the answer to a request that was sent at `sent_at`: the lease had `left` seconds left."""
        self.valid_until = sent_at + left
        self.renew_at = sent_at + left / 3


class LockKeeper:
    """Renews the leases of one process on the locks of one backend. `lock_keeper_of` returns it.

    Args:
        backend: the server and namespace.

    Attributes:
        leases: the keeper of the balancer's leases, whose thread this keeper uses.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.leases: LeaseKeeper = lease_keeper_of(backend)
        self.after_fork()
        backend.on_new_epoch(self._start_over)
        backend.on_close(self.close)
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: start without leases. The parent continues to renew its leases."""
        # Each access to `_held` is a single atomic operation, so no lock is needed. A lease ends when `pop` removes its
        # token. Only one `pop` can find the token. So each lease ends only once: it is either released or lost.
        self._held: dict[str, weakref.ref[Held]] = {}
        self._closed = False

    def token(self) -> str:
        """Return a new unique token, which contains the end of the name of this process."""
        process, _, number = self.leases.token()[1:].rpartition(":")
        return f"@{process[-_MAX_TOKEN_PROCESS:]}:{number}"

    def tombstone_ms(self) -> int:
        """Return for how many ms the server must refuse the token of an abandoned request."""
        return math.ceil(max(self._backend.deadline, TOMBSTONE_S) * 1000)

    def hold(self, held: Held) -> bool:
        """Keep a lease from now on. Returns False when the keeper is closed."""
        # When the callback runs, `held` no longer exists. So the values that the callback needs are bound here.
        dropped = partial(self._dropped, held.place, held.token, held.renewed)
        self._held[held.token] = weakref.ref(held, dropped)
        if self._closed:
            self._held.pop(held.token, None)
            return False
        if held.renewed:
            self.leases.jobs.at(held.renew_at, self._renew_due)
        return True

    def holds(self, held: Held) -> bool:
        """Whether this process holds the lease, as far as it knows; False in a forked child."""
        return held.token in self._held

    def end(self, held: Held) -> bool:
        """Stop keeping a lease. Returns whether this process held it until now."""
        return self._held.pop(held.token, None) is not None

    def lose(self, held: Held, reason: str) -> None:
        """Mark a lease lost. Does nothing if it has already ended."""
        if self.end(held):
            held.lost = LockNotOwned(held.place.name, reason)
            _log.warning("a lock is lost: %s", held.lost)

    def close(self) -> None:
        """Release all held leases."""
        self._closed = True
        for held in self._all():
            self.leases.release_last(commands.release(held.place, held.token), partial(self.end, held))
        self.leases.send_last_releases()

    def _all(self) -> list[Held]:
        return [held for reference in list(self._held.values()) if (held := reference()) is not None]

    def _dropped(self, place: Place, token: str, renewed: bool, _: object) -> None:
        """Stop keeping a lease whose object was garbage-collected, and release it unless it ends at its timeout.

        This method takes no lock, so that the garbage collector may call it.
        """
        if self._held.pop(token, None) is not None and renewed:
            self.leases.jobs.put(partial(self._forget, place, token))

    # Everything below runs on the background thread.

    def _forget(self, place: Place, token: str) -> None:
        _log.warning(
            "the lock %r was released because nothing refers to it; use `with`, or keep the object", place.name
        )
        self.leases.retry_in_background(commands.release(place, token), TOMBSTONE_S)

    def _renew_due(self) -> None:
        now = time.monotonic()
        due = []
        for held in self._all():
            if not held.renewed:
                continue
            if now >= held.valid_until:
                self.lose(held, "it could not be renewed in time")
            elif held.renew_at - now <= held.ttl * _AHEAD:
                due.append(held)
        for first in range(0, len(due), _AT_ONCE):
            self._renew(due[first : first + _AT_ONCE])
        soonest = min((held.renew_at for held in self._all() if held.renewed), default=math.inf)
        if soonest < math.inf:
            self.leases.jobs.at(soonest, self._renew_due)

    def _renew(self, due: list[Held]) -> None:
        sent_at = time.monotonic()
        batch = Batch(tuple(commands.extend(held.place, held.token, held.ttl) for held in due))
        timeout_s = min(self._backend.deadline, max(0.02, min(held.ttl for held in due) * 0.15))
        try:
            answers = self._backend.run(batch.settled(), timeout_s)
        except AgentPerfError as error:
            answers = [error] * len(due)
        for held, answer in zip(due, answers, strict=True):
            if isinstance(answer, AgentPerfError):
                held.renew_at = min(time.monotonic() + held.ttl / 10, held.valid_until)
            elif answer is None:
                self.lose(held, "it expired before it was renewed, or another caller released it")
            else:
                held.valid(sent_at, answer)

    def _start_over(self) -> None:
        """Mark all leases lost, because the server lost its data."""
        for held in self._all():
            self.lose(held, "the server lost its data")


def lock_keeper_of(backend: Backend) -> LockKeeper:
    """Return the keeper of this process for the locks of a backend."""
    return backend.share("locks-keeper", lambda: LockKeeper(backend))
