"""The queue for leases.

The queue is on the server, in order of arrival and priority. A script that frees capacity grants the capacity to the
first waiter: the script stores the grant and publishes a message. The message is only a wake-up; the waiter reads the
stored grant. Every waiter also polls at least once per second. A poll shows that the waiter is alive, ends expired
leases, and grants free capacity to waiters. Therefore a lost message only causes a delay. Dead waiters are skipped, and
a grant to a dead waiter blocks capacity only for a few seconds.

In a pool with several shards, each shard has a queue. A waiter is in the queue of one shard; elsewhere.py describes how
the waiter moves to another shard.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from agentperf_redis.backend import Backend
from agentperf_redis.background import register_for_fork
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Granted, Pool, Queued
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.command import Flow, Wait, WakeUp
from agentperf_redis.transport.pubsub import listener  # noqa: F401  see `Bus.subscribe`
from agentperf_redis.transport.pubsub.subscriptions import Subscription

LIVE_MS = 3000
"""Time without a poll after which a waiter loses its position, ms. A waiter polls at least once per second."""
BOOST_MS_PER_POINT = 1000
"""Time by which each point of priority moves a waiter ahead in the queue, ms.

Priorities are bounded, so no waiter starves.
"""
NEW_POSITION = "-"
"""Sent by a new waiter instead of its position, since it has no position in the queue yet."""
FREE = b"free"
"""The message of a shard that has free capacity and no waiters of its own. Other messages are tokens."""
_MIN_WAIT_S = 0.002


class Queues:
    """The waiters of this process by token, so that a published message wakes the right waiter.

    The first wait in a pool subscribes to the pool's channel. The process stays subscribed, since one wait is usually
    followed by others.
    """

    watched_until: dict[Pool, float]
    """The watched shards, each with the time at which the watch ends, by `time.monotonic`. See elsewhere.py."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.after_fork()
        backend.on_close(self._close)
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: drop the parent's waiters and subscriptions; the child subscribes on its first wait."""
        self._lock = threading.Lock()
        self._wake_ups: dict[str, WakeUp] = {}
        self._freed_for: dict[str, tuple[str, list[Pool]]] = {}
        self.watched_until: dict[Pool, float] = {}
        self._channels: dict[str, Subscription] = {}

    def join(self, pool: Pool, token: str) -> WakeUp:
        """Add a waiter. Returns the wake-up that is sent when a grant for its token is published."""
        wake_up = WakeUp()
        with self._lock:
            self._wake_ups[token] = wake_up
            self._subscribe(pool)
        return wake_up

    def leave(self, token: str) -> None:
        """Remove a waiter."""
        with self._lock:
            self._wake_ups.pop(token, None)

    def join_elsewhere(self, others: Sequence[Pool], token: str) -> None:
        """From now on, also wake this waiter when one of the other shards may have free capacity."""
        with self._lock:
            for shard in others:
                self._subscribe(shard)
            self._freed_for[token] = (others[0].agent_type, [])

    def leave_elsewhere(self, token: str) -> None:
        """Undo `join_elsewhere`. Freed shards that the waiter has not tried yet are passed on to other waiters."""
        with self._lock:
            _, shards = self._freed_for.pop(token, ("", []))
        for shard in shards:
            self.freed(shard)

    def take_freed(self, token: str) -> Pool | None:
        """Remove and return a shard that may have free capacity for this waiter; None if there is no such shard."""
        with self._lock:
            _, shards = self._freed_for.get(token, ("", []))
            return shards.pop() if shards else None

    def freed(self, shard: Pool) -> None:
        """Wake the waiter that has waited longest, so that it tries this shard, which may have free capacity."""
        wake_up = None
        with self._lock:
            self.watched_until.pop(shard, None)
            for token, (agent_type, shards) in self._freed_for.items():
                if agent_type == shard.agent_type and shard not in shards:
                    shards.append(shard)
                    wake_up = self._wake_ups.get(token)
                    break
        if wake_up is not None:
            wake_up.send()

    def _subscribe(self, pool: Pool) -> None:
        channel = pool.keys.waitq
        if channel not in self._channels:
            on_message = partial(self._on_message, pool)
            self._channels[channel] = self._backend.bus.subscribe(channel, on_message, self._on_gap)

    def _on_message(self, pool: Pool, message: bytes) -> None:
        if message == FREE:
            self.freed(pool)
            return
        wake_up = self._wake_ups.get(message.decode(errors="replace"))
        if wake_up is not None:
            wake_up.send()

    def _on_gap(self) -> None:
        with self._lock:
            self.watched_until.clear()
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
    """A waiter's request for a position in the queue.

    Attributes:
        pool: the pool.
        token: the waiter's token.
        ttl_ms: TTL of the lease after the grant is fetched, ms.
        priority: the waiter is queued as if it had arrived this many seconds earlier.
        require: labels; the instance must have all of them.
        held: the position that the waiter already has, or NEW_POSITION.
        tombstone_ms: ms for which the server refuses the token after the waiter has left the queue.
        tokens: expected tokens of the work, counted against the instance's tokens per minute.
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
    """The result of waiting in the queue.

    Attributes:
        granted: the grant that was fetched; None if the wait ended first, the token is spent, or `moved` is set.
        sent_at: when the most recent request was sent, by time.monotonic.
        spent: whether the token's lease ended before the reply arrived. If so, retry with another token.
        ahead: number of waiters ahead of this waiter, according to the most recent reply.
        position: the most recent position of the waiter.
        retry_after: seconds until a timer, such as the expiry of a lease, may free capacity; at most 1. If all
            instances are unhealthy, resting or rate-limited: seconds until the first of them comes back, if known.
        moved: a lease in another shard, or None. If set, the caller must release the place in the queue.
    """

    granted: Granted | None
    sent_at: float
    spent: bool
    ahead: int
    position: str
    retry_after: float = 1.0
    moved: Lease | None = None


class OtherShards(Protocol):
    """The other shards of a waiter's pool; see elsewhere.py."""

    poll_s: float
    """Max seconds between two calls of `look`."""

    def look(self) -> Flow[Lease | None]:
        """If another shard has free capacity, lease a unit there."""


def wait_in_queue(
    queues: Queues, entry: QueueEntry, until: float, others: OtherShards | None = None
) -> Flow[QueueResult]:
    """Wait for a grant until time.monotonic reaches `until`, or for a lease in another shard. Then leave the queue."""
    wake_up = queues.join(entry.pool, entry.token)
    held = entry.held
    try:
        while True:
            wake_up.reset()
            sent_at = time.monotonic()
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
                return QueueResult(answer, sent_at, False, 0, held)
            if not isinstance(answer, Queued):
                return QueueResult(None, sent_at, True, 0, held)
            held = answer.position
            left = until - time.monotonic()
            if left <= 0:
                yield from commands.release(entry.pool, entry.token, tombstone_ms=entry.tombstone_ms)
                retry_after = answer.back_after or answer.retry_after
                return QueueResult(None, sent_at, False, answer.ahead, held, retry_after)
            pause = max(_MIN_WAIT_S, answer.retry_after)
            if others is not None:
                moved = yield from others.look()
                if moved is not None:
                    return QueueResult(None, sent_at, False, 0, held, moved=moved)
                pause = min(pause, others.poll_s)
            yield from Wait(wake_up, min(left, pause))
    finally:
        queues.leave(entry.token)


def queues_of(backend: Backend) -> Queues:
    """Return the waiters of this process for a backend."""
    return backend.share("lb-queues", lambda: Queues(backend))
