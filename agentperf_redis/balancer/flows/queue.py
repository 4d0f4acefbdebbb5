"""Standing in line for a lease.

The line is kept on the server, in the order of arrival. Whoever frees capacity leases it on behalf of the head of the
line and stores that as a grant; then a message says so. The stored grant is the truth and the message a hint: every
waiter also asks by itself, at least each second, which tells the server that it lives, clears what has expired and
hands over what is free. So no wake-up is ever lost, a dead waiter is passed over, and a dead grantee costs seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass

from agentperf_redis.backend import Backend
from agentperf_redis.background import register_for_fork
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Granted, Pool, Queued
from agentperf_redis.command import Flow, Wait, WakeUp
from agentperf_redis.transport.pubsub.subscriptions import Subscription

LIVE_MS = 3000
"""Silence after which a waiter loses its place; it asks at least each second."""
BOOST_MS_PER_POINT = 1000
"""What a point of priority is worth: as if the caller had come a second earlier. So nobody waits for ever."""
NEW_POSITION = "-"
"""Asks for a place at the end of the line."""
_MIN_WAIT_S = 0.002


class Queues:
    """Who stands in line in this process, so that a message finds its waiter.

    A pool's channel is subscribed when somebody first waits there, and stays so: who waited once will wait again.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.after_fork()
        backend.on_close(self._close)
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: the parent's waiters wait there, and this process's bus has no subscription yet."""
        self._lock = threading.Lock()
        self._wake_ups: dict[str, WakeUp] = {}
        self._channels: dict[str, Subscription] = {}

    def join(self, pool: Pool, token: str) -> WakeUp:
        """Return what is given a hint when a grant for this token is announced."""
        wake_up = WakeUp()
        channel = pool.keys.waitq
        with self._lock:
            self._wake_ups[token] = wake_up
            if channel not in self._channels:
                self._channels[channel] = self._backend.bus.subscribe(channel, self._on_message, self._on_gap)
        return wake_up

    def leave(self, token: str) -> None:
        """Wait no more."""
        with self._lock:
            self._wake_ups.pop(token, None)

    def _on_message(self, message: bytes) -> None:
        wake_up = self._wake_ups.get(message.decode(errors="replace"))
        if wake_up is not None:
            wake_up.send()

    def _on_gap(self) -> None:
        with self._lock:
            wake_ups = list(self._wake_ups.values())
        for wake_up in wake_ups:
            wake_up.send()

    def _close(self) -> None:
        for subscription in self._channels.values():
            with contextlib.suppress(OSError):
                subscription.close()
        self._channels.clear()
        self._on_gap()


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A place in line, as its holder asks for it.

    Attributes:
        pool: where.
        token: under which it is held.
        ttl_ms: life of the lease once fetched, ms.
        priority: seconds earlier than now that it counts as having come.
        require: labels the instance must have.
        held: the place held before, or NEW_POSITION.
        tombstone_ms: how long the token is refused after the line was left, ms.
        tokens: counted against the instance's tokens a minute.
    """

    pool: Pool
    token: str
    ttl_ms: int
    priority: int
    require: frozenset[str]
    held: str
    tombstone_ms: int
    tokens: int


@dataclass(frozen=True, slots=True)
class QueueResult:
    """What the line led to.

    Attributes:
        granted: the grant that was fetched, or None when time was up.
        asked_at: when it was asked for, by time.monotonic.
        spent: whether the token's lease had come and gone before its answer came; ask again under another.
        ahead: how many were still before it.
        position: the place held to the end.
        retry_after: seconds until capacity may come back by itself, at most 1.
    """

    granted: Granted | None
    asked_at: float
    spent: bool
    ahead: int
    position: str
    retry_after: float = 1.0


def wait_in_queue(queues: Queues, entry: QueueEntry, until: float) -> Flow[QueueResult]:
    """Wait for a grant until a moment of time.monotonic, then leave the line."""
    wake_up = queues.join(entry.pool, entry.token)
    held = entry.held
    try:
        while True:
            wake_up.reset()
            asked_at = time.monotonic()
            answer = yield from commands.wait(
                entry.pool,
                entry.token,
                ttl_ms=entry.ttl_ms,
                live_ms=LIVE_MS,
                boost_ms=entry.priority * BOOST_MS_PER_POINT,
                require=entry.require,
                position=held,
                tokens=entry.tokens,
            )
            if isinstance(answer, Granted):
                return QueueResult(answer, asked_at, False, 0, held)
            if not isinstance(answer, Queued):
                return QueueResult(None, asked_at, True, 0, held)
            held = answer.position
            left = until - time.monotonic()
            if left <= 0:
                yield from commands.release(entry.pool, entry.token, tombstone_ms=entry.tombstone_ms)
                return QueueResult(None, asked_at, False, answer.ahead, held, answer.retry_after)
            yield from Wait(wake_up, min(left, max(_MIN_WAIT_S, answer.retry_after)))
    finally:
        queues.leave(entry.token)


def queues_of(backend: Backend) -> Queues:
    """Return the lines of this process for a backend."""
    return backend.share("lb-queues", lambda: Queues(backend))
