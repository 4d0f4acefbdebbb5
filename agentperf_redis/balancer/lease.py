"""The right to one unit of an instance's capacity, for a while."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable
from enum import Enum
from typing import NoReturn, Protocol

from agentperf_redis import arguments
from agentperf_redis.background import ModuleLock
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.model import AgentInstance, Facts, Outcome, snapshot
from agentperf_redis.errors import LeaseLost


class KeeperProtocol(Protocol):
    """What a lease asks of the process's keeper of leases."""

    def abandon(self, pool: Pool, token: str, instance_id: str) -> bool:
        """Give back a lease whose object is gone. Called from `__del__`, so it takes no lock."""

    def lost(self, lease: Lease, loss: LeaseLost, on_lost: Callable[[LeaseLost], None] | None) -> None:
        """Report a lost lease, once."""


_transitions = ModuleLock()
"""Decides between a release and a loss that happen at once. Held for an assignment only, never while calling out."""


class _State(Enum):
    HELD = "held"
    RELEASED = "released"
    LOST = "lost"


class Lease:
    """One unit of an instance's capacity, held until released. Kept alive by the process's keeper.

    The keeper refers to it weakly: a lease that nobody holds any more is given back, with a ResourceWarning.
    It belongs to the process that acquired it. In a forked child, the copy of the object is neither held nor renewed,
    and ending it does nothing.

    Attributes:
        agent_type: the pool.
        token: names the lease on the server; it begins with the process that holds it.
        fence: rises with every lease of the instance. A resource that remembers the highest it saw, and refuses lower
            ones, is safe from holders that were paused beyond their lease.
        ttl: seconds it lives without renewal.
        tokens: counted against the instance's tokens a minute when it was granted.
        tokens_used: how many it really took. Set it before the lease is released; None when `tokens` was right.
    """

    __slots__ = (
        "__weakref__",
        "_facts",
        "_keeper",
        "_loss",
        "_on_lost",
        "_outcome",
        "_pid",
        "_state",
        "agent_type",
        "fence",
        "hold_until",
        "pool",
        "renew_at",
        "started",
        "token",
        "tokens",
        "tokens_used",
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
        asked_at: float,
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
        self.tokens_used: int | None = None
        self._outcome: Outcome | None = None
        self.started = time.monotonic()
        # Counted from before the request was sent: this process never believes in a lease longer than the server does.
        self.renew_at = asked_at + ttl / 3
        self.valid_until = asked_at + ttl
        self.hold_until = asked_at + max_hold
        self._state = _State.HELD  # last: a signal handler may raise before, and `__del__` then has nothing to say

    def __repr__(self) -> str:
        return f"Lease({self._facts[0]!r} of {self.agent_type!r}, {self._state.value}, token={self.token!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lease stays with the process that took it; send the instance's id, or its fence")

    def __del__(self) -> None:
        if getattr(self, "_state", None) is _State.HELD:
            me, self._state = repr(self), _State.RELEASED
            # Nothing can be done about a failure here, and at the end of the interpreter much is gone already.
            with contextlib.suppress(Exception):
                if self._keeper.abandon(self.pool, self.token, self._facts[0]):
                    warnings.warn(f"{me} was dropped without release", ResourceWarning, source=self, stacklevel=2)

    @property
    def instance(self) -> AgentInstance:
        """The instance as it was when the lease was granted, carrying this lease."""
        return snapshot(self._facts, self)

    @property
    def outcome(self) -> Outcome | str | None:
        """How the work went. Set it inside `with lb.lease(...)`; None lets the block's end decide."""
        return self._outcome

    @outcome.setter
    def outcome(self, value: Outcome | str | None) -> None:
        self._outcome = None if value is None else arguments.choice("outcome", value, Outcome)

    @property
    def instance_id(self) -> str:
        """Name of the instance."""
        return self._facts[0]

    @property
    def held(self) -> bool:
        """Whether it is neither released nor lost, as far as this process knows; False in a forked child."""
        return self._state is _State.HELD and self.is_own

    @property
    def is_own(self) -> bool:
        """Whether this process acquired it; False in a process that was forked since."""
        return self._pid == os.getpid()

    @property
    def lost(self) -> LeaseLost | None:
        """Why it is lost, or None."""
        return self._loss

    @property
    def remaining(self) -> float:
        """Seconds that it surely lives on without another renewal; 0.0 when it has ended."""
        return max(0.0, self.valid_until - time.monotonic()) if self.held else 0.0

    def check(self) -> None:
        """Raise if this process knows that the lease is lost. No I/O.

        It knows what the last renewal told it, and the time: that a lease was ended on the server (by hand, or by a
        server that lost its data) shows with the next renewal, up to a third of the TTL later. What must not happen
        twice is safe only where the resource checks the `fence`.

        Raises:
            LeaseLost: when a renewal found it lost, or it could not be renewed in time.
        """
        if self._loss is not None:
            raise self._loss
        if self.held and time.monotonic() > self.valid_until:
            self.lose("it could not be renewed in time")
            if self._loss is not None:
                raise self._loss

    def kept_by(self, keeper: KeeperProtocol) -> bool:
        """Whether it came from the backend of this keeper."""
        return self._keeper is keeper

    def end(self) -> bool:
        """Mark it released. Returns whether it was held until now, and by this process."""
        with _transitions.lock:
            if self._state is not _State.HELD or not self.is_own:
                return False
            self._state = _State.RELEASED
            return True

    def lose(self, reason: str) -> None:
        """Mark it lost and tell who asked to be told; nothing when it has ended already."""
        with _transitions.lock:
            if self._state is not _State.HELD or not self.is_own:
                return
            self._state = _State.LOST
            self._loss = LeaseLost(self.agent_type, self.token, reason)
        self._keeper.lost(self, self._loss, self._on_lost)
