"""A lease: the right to one unit of an instance's capacity, for a limited time."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Protocol, Self

from agentperf_redis import arguments
from agentperf_redis.background import ModuleLock
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.model import MAX_TTL_S, MIN_TTL_S, AgentInstance, Facts, Outcome, checked_rest, snapshot
from agentperf_redis.errors import LeaseLost


class KeeperProtocol(Protocol):
    """The part of the lease keeper that a lease uses."""

    def abandon(self, pool: Pool, token: str, instance_id: str) -> bool:
        """Release a lease whose object is being deleted. Called from `__del__`, so it takes no lock."""

    def lost(self, lease: Lease, loss: LeaseLost, on_lost: Callable[[LeaseLost], None] | None) -> None:
        """Report that a lease is lost. Called once per lease."""

    def held_as(self, token: str) -> Lease | None:
        """Return the lease with this token if this process holds it."""

    def extend(self, lease: Lease, ttl: float) -> None:
        """Give a lease another TTL."""

    async def aextend(self, lease: Lease, ttl: float) -> None:
        """Like `extend`, without blocking the event loop."""


keepers: weakref.WeakSet[KeeperProtocol] = weakref.WeakSet()
"""The lease keepers of this process."""

_transitions = ModuleLock()
"""Guards the state of all leases: when a lease is released and lost at the same time, only one change takes effect.
The lock is held only for an assignment, and never while other code is called."""


class _State(Enum):
    HELD = "held"
    RELEASED = "released"
    LOST = "lost"
    COPY = "copy"
    """The object is a copy that was pickled in another process, or after the lease had ended."""


class Lease:
    """One unit of an instance's capacity, held until it is released. The process's lease keeper renews the lease.

    The keeper has only a weak reference to the lease. When no other reference is left, the lease is released, with a
    ResourceWarning. Copies by `copy`, `deepcopy` and `dataclasses.asdict`, and pickles that return to this process, are
    the same lease: releasing one of them releases the lease, once.

    A lease belongs to the process that acquired it. Another process may have a copy, through a fork or a pickle. That
    copy has the facts of the lease, such as `fence`, but it is neither held nor renewed, and releasing it does nothing.
    `LoadBalancer.release_token` ends a lease of any process.

    Attributes:
        agent_type: the pool.
        token: identifies the lease on the server; begins with the name of the process.
        fence: fencing token, which rises with every lease of the instance. A holder may be paused beyond the end of its
            lease. A resource is safe from such holders if it remembers the highest fencing token and refuses lower
            ones.
        ttl: seconds after which the lease expires unless it is renewed.
        tokens: number of tokens counted against the instance's tokens per minute at the grant.
        retry_after: seconds for which the instance gets no work after the outcome "rate_limited". Set this attribute
            before the release.
    """

    __slots__ = (
        "__weakref__",
        "_facts",
        "_keeper",
        "_loss",
        "_on_lost",
        "_outcome",
        "_pid",
        "_retry_after",
        "_state",
        "_tokens_used",
        "agent_type",
        "fence",
        "hold_until",
        "pool",
        "renew_at",
        "started",
        "token",
        "tokens",
        "ttl",
        "valid_until",
    )

    def __init__(
        self,
        keeper: KeeperProtocol,
        pool: Pool,
        token: str,
        fence: int,
        facts: Facts,
        *,
        ttl: float,
        sent_at: float,
        max_hold: float,
        on_lost: Callable[[LeaseLost], None] | None,
        tokens: int = 0,
    ) -> None:
        self._keeper = keeper
        self._facts = facts
        self._on_lost = on_lost
        self._loss: LeaseLost | None = None
        self._pid = os.getpid()
        self.pool = pool
        self.agent_type = pool.agent_type
        self.token = token
        self.fence = fence
        self.ttl = ttl
        self.tokens = tokens
        self._tokens_used: int | None = None
        self._outcome: Outcome | None = None
        self._retry_after: float | None = None
        self.started = time.monotonic()
        # The times below count from `sent_at`, when the request was sent. So the lease ends in this process no later
        # than on the server.
        self.renew_at = sent_at + ttl / 3
        self.valid_until = sent_at + ttl
        self.hold_until = sent_at + max_hold
        self._state = _State.HELD  # set last: if a signal handler raises before this line, `__del__` must do nothing

    def __repr__(self) -> str:
        return f"Lease({self._facts[0]!r} of {self.agent_type!r}, {self._state.value}, token={self.token!r})"

    def __copy__(self) -> Self:
        """Return the lease itself. A copied `AgentInstance` therefore carries the same lease as the original."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[..., Lease], tuple[object, ...]]:
        """Pickle the facts of the lease. `_unpickled` explains the result of unpickling."""
        facts = (self.pool, self.token, self.fence, self._facts, self.ttl, self.tokens, self._tokens_used)
        return _unpickled, (*facts, self._outcome, self._loss)

    def __del__(self) -> None:
        if getattr(self, "_state", None) is _State.HELD:
            me, self._state = repr(self), _State.RELEASED
            # An error cannot be handled here. It may occur at interpreter exit, when many objects are already gone.
            with contextlib.suppress(Exception):
                if self._keeper.abandon(self.pool, self.token, self._facts[0]):
                    warnings.warn(f"{me} was dropped without release", ResourceWarning, source=self, stacklevel=2)

    @property
    def instance(self) -> AgentInstance:
        """The instance as it was when the lease was granted, carrying this lease."""
        return snapshot(self._facts, self)

    @property
    def outcome(self) -> Outcome | str | None:
        """The result of the work, which may be set inside `with lb.lease(...)`.

        If it is None, the result depends on whether an exception leaves the block, and on the type of the exception.
        """
        return self._outcome

    @outcome.setter
    def outcome(self, value: Outcome | str | None) -> None:
        self._outcome = None if value is None else arguments.choice("outcome", value, Outcome)

    @property
    def tokens_used(self) -> int | None:
        """Number of tokens that the work used; None if it used the number in `tokens`. Set this before the release."""
        return self._tokens_used

    @tokens_used.setter
    def tokens_used(self, value: int | None) -> None:
        self._tokens_used = None if value is None else arguments.count("tokens_used", value, minimum=0)

    @property
    def retry_after(self) -> float | None:
        """Seconds for which the instance gets no work after the outcome "rate_limited"; None for the default."""
        return self._retry_after

    @retry_after.setter
    def retry_after(self, value: float | None) -> None:
        self._retry_after = None if value is None else checked_rest("retry_after", value, minimum=0.0)

    @property
    def instance_id(self) -> str:
        """Name of the instance."""
        return self._facts[0]

    @property
    def held(self) -> bool:
        """Whether the lease is neither released nor lost, as far as this process knows; False in a forked child."""
        return self._state is _State.HELD and self.is_own

    @property
    def is_own(self) -> bool:
        """Whether this process acquired the lease; False in a child that was forked later."""
        return self._pid == os.getpid()

    @property
    def lost(self) -> LeaseLost | None:
        """The error that says why the lease is lost, or None."""
        return self._loss

    @property
    def remaining(self) -> float:
        """Seconds for which the lease is valid without another renewal; 0.0 when it has ended."""
        return max(0.0, self.valid_until - time.monotonic()) if self.held else 0.0

    def check(self) -> None:
        """Raise LeaseLost if this process knows that the lease is lost. Does no I/O.

        The process knows only the time and the result of the last renewal. The lease may also end on the server, by
        hand or because the server lost its data. The process notices this only at the next renewal, up to a third of
        the TTL later. Work that must not happen twice is safe only if the resource checks the `fence`.

        Raises:
            LeaseLost: when a renewal found that the lease is lost, or the lease could not be renewed in time.
        """
        if self._loss is not None:
            raise self._loss
        if self.held and time.monotonic() > self.valid_until:
            self.lose("it could not be renewed in time")
            if self._loss is not None:
                raise self._loss

    def extend(self, ttl: float) -> None:
        """Give the lease another TTL, which begins now. Later renewals keep this TTL.

        A longer TTL helps before a long call of C code, which keeps the background thread from renewing the lease.

        Args:
            ttl: seconds, 0.05 to 86,400, after which the lease expires unless it is renewed. It may be shorter than the
                time that was left.

        Raises:
            LeaseLost: when this process never held the lease, or no longer holds it.
        """
        self._keeper.extend(self, self._checked_ttl(ttl))

    async def aextend(self, ttl: float) -> None:
        """Like `extend`, without blocking the event loop."""
        await self._keeper.aextend(self, self._checked_ttl(ttl))

    def _checked_ttl(self, ttl: float) -> float:
        seconds = arguments.seconds("ttl", ttl, minimum=MIN_TTL_S, maximum=MAX_TTL_S)
        if self._loss is not None:
            raise self._loss
        if not self.held:
            reason = "another process holds it" if self._state is _State.COPY or not self.is_own else "it was released"
            raise LeaseLost(self.agent_type, self.token, reason)
        return seconds

    def kept_by(self, keeper: KeeperProtocol) -> bool:
        """Whether this keeper renews the lease. Also True for an unpickled copy, although no keeper renews it."""
        return self._keeper is keeper or self._keeper is _NO_KEEPER

    def become_copy(self, tokens_used: int | None, outcome: Outcome | None, loss: LeaseLost | None) -> None:
        """Mark this object as a copy of a lease that another process holds, or that has ended."""
        self._state = _State.COPY
        self._tokens_used, self._outcome, self._loss = tokens_used, outcome, loss

    def end(self) -> bool:
        """Mark the lease released. Returns whether this process held it until now."""
        with _transitions.lock:
            if self._state is not _State.HELD or not self.is_own:
                return False
            self._state = _State.RELEASED
            return True

    def lose(self, reason: str) -> None:
        """Mark the lease lost and call its `on_lost`. Does nothing if the lease has already ended."""
        with _transitions.lock:
            if self._state is not _State.HELD or not self.is_own:
                return
            self._state = _State.LOST
            self._loss = LeaseLost(self.agent_type, self.token, reason)
        self._keeper.lost(self, self._loss, self._on_lost)


class _NoKeeper:
    """The keeper of an unpickled copy. It renews and releases nothing."""

    def abandon(self, pool: Pool, token: str, instance_id: str) -> bool:  # noqa: ARG002  a copy is never held
        return False

    def lost(self, lease: Lease, loss: LeaseLost, on_lost: Callable[[LeaseLost], None] | None) -> None:
        """Never called, since the copy is not held."""

    def held_as(self, token: str) -> Lease | None:  # noqa: ARG002  this keeper holds no leases
        return None

    def extend(self, lease: Lease, ttl: float) -> None:
        """Never called, since the copy is not held."""

    async def aextend(self, lease: Lease, ttl: float) -> None:
        """Never called, since the copy is not held."""


_NO_KEEPER = _NoKeeper()


def _unpickled(
    pool: Pool,
    token: str,
    fence: int,
    facts: Facts,
    ttl: float,
    tokens: int,
    tokens_used: int | None,
    outcome: Outcome | None,
    loss: LeaseLost | None,
) -> Lease:
    """Return the lease that a pickle describes.

    In the process that holds the lease, return the original object. In other processes, and after the end of the lease,
    return a copy. The copy has the facts of the lease, such as its fencing token, but it is not held: releasing it does
    nothing.
    """
    for keeper in list(keepers):
        lease = keeper.held_as(token)
        if lease is not None:
            return lease
    now = time.monotonic()
    copied = Lease(
        _NO_KEEPER, pool, token, fence, facts, ttl=ttl, sent_at=now, max_hold=0.0, on_lost=None, tokens=tokens
    )
    copied.become_copy(tokens_used, outcome, loss)
    return copied
