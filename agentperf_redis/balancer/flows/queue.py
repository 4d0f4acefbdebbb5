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
from agentperf_redis.command import Flow, Hint, Wait
from agentperf_redis.transport.pubsub.subscriptions import Subscription

LIVE_MS = 3000
"""Silence after which a waiter loses its place; it asks at least each second."""
BOOST_MS_PER_POINT = 1000
"""What a point of priority is worth: as if the caller had come a second earlier. So nobody waits for ever."""
FIRST_PLACE = "-"
"""Asks for a place at the end of the line."""
_LEAST_WAIT_S = 0.002


class Lines:
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
        self._hints: dict[str, Hint] = {}
        self._channels: dict[str, Subscription] = {}

    def join(self, pool: Pool, token: str) -> Hint:
        """Return what is given a hint when a grant for this token is announced."""
        hint = Hint()
        channel = pool.keys.waitq
        with self._lock:
            self._hints[token] = hint
            if channel not in self._channels:
                self._channels[channel] = self._backend.bus.subscribe(channel, self._heard, self._missed)
        return hint

    def leave(self, token: str) -> None:
        """Wait no more."""
        with self._lock:
            self._hints.pop(token, None)

    def _heard(self, message: bytes) -> None:
        hint = self._hints.get(message.decode(errors="replace"))
        if hint is not None:
            hint.give()

    def _missed(self) -> None:
        with self._lock:
            hints = list(self._hints.values())
        for hint in hints:
            hint.give()

    def _close(self) -> None:
        for subscription in self._channels.values():
            with contextlib.suppress(OSError):
                subscription.close()
        self._channels.clear()
        self._missed()


@dataclass(frozen=True, slots=True)
class Place:
    """A place in line, as its holder asks for it.

    Attributes:
        pool: where.
        token: under which it is held.
        ttl_ms: life of the lease once fetched, ms.
        priority: seconds earlier than now that it counts as having come.
        require: labels the instance must have.
        held: the place held before, or FIRST_PLACE.
        bury_ms: how long the token is refused after the line was left, ms.
        tokens: counted against the instance's tokens a minute.
    """

    pool: Pool
    token: str
    ttl_ms: int
    priority: int
    require: frozenset[str]
    held: str
    bury_ms: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What the line led to.

    Attributes:
        granted: the grant that was fetched, or None when time was up.
        asked_at: when it was asked for, by time.monotonic.
        spent: whether the token's lease had come and gone before its answer came; ask again under another.
        ahead: how many were still before it.
        place: the place held to the end.
        retry_after: seconds until capacity may come back by itself, at most 1.
    """

    granted: Granted | None
    asked_at: float
    spent: bool
    ahead: int
    place: str
    retry_after: float = 1.0


def stand_in_line(lines: Lines, place: Place, until: float) -> Flow[Turn]:
    """Wait for a grant until a moment of time.monotonic, then leave the line."""
    hint = lines.join(place.pool, place.token)
    held = place.held
    try:
        while True:
            hint.reset()
            asked_at = time.monotonic()
            answer = yield from commands.wait(
                place.pool,
                place.token,
                ttl_ms=place.ttl_ms,
                live_ms=LIVE_MS,
                boost_ms=place.priority * BOOST_MS_PER_POINT,
                require=place.require,
                place=held,
                tokens=place.tokens,
            )
            if isinstance(answer, Granted):
                return Turn(answer, asked_at, False, 0, held)
            if not isinstance(answer, Queued):
                return Turn(None, asked_at, True, 0, held)
            held = answer.place
            left = until - time.monotonic()
            if left <= 0:
                yield from commands.release(place.pool, place.token, bury_ms=place.bury_ms)
                return Turn(None, asked_at, False, answer.ahead, held, answer.poll_after)
            yield from Wait(hint, min(left, max(_LEAST_WAIT_S, answer.poll_after)))
    finally:
        lines.leave(place.token)


def lines_of(backend: Backend) -> Lines:
    """Return the lines of this process for a backend."""
    return backend.share("lb-lines", lambda: Lines(backend))
