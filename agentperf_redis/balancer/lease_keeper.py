"""Keeps the leases of this process alive, on one background thread, and gives back what was left behind.

Event loops block and workers compute, so leases are renewed by a thread of their own, in one batch a pool, when a third
of their life is over. The keeper refers to leases weakly: it must not keep alive what its user has dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, register_for_fork
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import AttachedLease
from agentperf_redis.balancer.registrations import Registrations
from agentperf_redis.balancer.server_clock import clock_of
from agentperf_redis.command import Batch, Command, WakeUp
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, LeaseLost
from agentperf_redis.transport.exchange import CLOSED

_log = logging.getLogger("agentperf_redis")

TOMBSTONE_S = 60.0
"""How long after a call could still arrive its token is refused, s. A clock of its own, not of the network's."""
_AHEAD = 0.1
"""Leases due within this share of their life are renewed along with the one that is due, in one batch."""
_ATTEMPT_TIMEOUT_SHARE = 0.3
"""Share of the shortest life that one round of renewals may wait in vain, s; two thirds are left when it begins."""
_MIN_PATIENCE_S = 0.02
_CLOSE_S = 5.0
_RETRY_S = 0.5


class LeaseKeeper:
    """One per backend and process; see `lease_keeper_of`.

    Args:
        backend: through which it renews and gives back.

    Attributes:
        jobs: its thread.
        registrations: of this process with the same backend, looked after on the same thread.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.jobs = Background("agentperf-balancer")
        self.registrations = Registrations(backend, clock_of(backend), self.jobs, self._attempt_timeout_s)
        self.after_fork()
        backend.on_new_epoch(self._start_over)
        backend.on_close(self.close)
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: begin with nothing. The parent keeps renewing what it holds."""
        # Needs no lock: each step is one operation of the dict, which a signal handler or `__del__` may interleave.
        self._held: dict[str, weakref.ref[Lease]] = {}
        self._closed = False
        self._numbers = itertools.count(1)

    @property
    def deadline(self) -> float:
        """Seconds that one request may take in all."""
        return self._backend.deadline

    def token(self) -> str:
        """Return a new token: unique, and readable as the process that asks."""
        return f"@{self._backend.process}:{next(self._numbers):x}"

    def tombstone_ms(self, ttl: float) -> int:
        """Return how long the token of an abandoned request has to be refused, ms."""
        return math.ceil((max(self._backend.deadline, ttl) + TOMBSTONE_S) * 1000)

    def hold(self, lease: Lease) -> bool:
        """Keep a lease alive from now on. Returns False when all was closed meanwhile."""
        self._held[lease.token] = weakref.ref(lease)
        if self._closed:  # looked at last: so either this sees that all is closed, or `close` sees the lease
            self._held.pop(lease.token, None)
            return False
        self.jobs.at(lease.renew_at, self._renew_due)
        return True

    def closed_error(self) -> BackendUnavailable:
        """Return the error of a call that was granted a lease while all was closed."""
        return BackendUnavailable(self._backend.address.masked, "not_applied", CLOSED)

    def drop(self, lease: AttachedLease) -> None:
        """Stop renewing a lease."""
        self._held.pop(lease.token, None)

    def held(self) -> list[Lease]:
        """Return the leases this process holds."""
        return [lease for reference in list(self._held.values()) if (lease := reference()) is not None and lease.held]

    def abandon(self, pool: Pool, token: str, instance_id: str) -> bool:
        """Give back a lease whose object is gone. Takes no lock, and so may be called from `__del__`.

        Returns:
            False when this keeper does not hold it: the object came with a fork, or all was closed before.
        """
        if self._closed or token not in self._held:
            return False
        self.jobs.put(partial(self._forget, pool, token, instance_id))
        return True

    def undo(self, pool: Pool, token: str, ttl: float) -> WakeUp:
        """See to it that a request of unknown outcome leaves no lease behind, even if the server is away for a while.

        Returns:
            Given once that was tried.
        """
        tried = WakeUp()
        self.retry_in_background(commands.release(pool, token, tombstone_ms=self.tombstone_ms(ttl)), ttl, tried)
        return tried

    def retry_in_background(self, command: Command[Any], seconds: float, tried: WakeUp | None = None) -> None:
        """Run a command on the background thread until the server answers, or this time is over."""
        self.jobs.put(partial(self._attempt, command, time.monotonic() + seconds, tried))

    def lost(self, lease: Lease, loss: LeaseLost, on_lost: Callable[[LeaseLost], None] | None) -> None:
        """Report a lost lease, once."""
        self.drop(lease)
        _log.warning("%s", loss)
        if on_lost is not None:
            # On the background thread, whichever noticed: what users do here must not hold up an event loop.
            self.jobs.put(partial(on_lost, loss))

    def close(self) -> None:
        """Give back what is still held, retry once what was put off, and end the thread."""
        if self._closed:
            return
        self._closed = True  # no lease is taken in from here on
        leases = [lease for lease in self.held() if lease.end()]
        with contextlib.suppress(AgentPerfError):
            if leases:
                self._backend.run(
                    Batch(
                        tuple(commands.release(lease.pool, lease.token, lease.instance_id) for lease in leases)
                    ).settled()
                )
        self.jobs.close(_CLOSE_S)

    # Everything below runs on the background thread.

    def _forget(self, pool: Pool, token: str, instance_id: str) -> None:
        self._held.pop(token, None)
        _log.warning(
            "the lease on %r of %r was given back because nothing refers to it any more; keep what acquire returned, "
            "or use `with lb.lease(...)`",
            instance_id,
            pool.agent_type,
        )
        self.retry_in_background(commands.release(pool, token, instance_id), TOMBSTONE_S)

    def _attempt(self, command: Command[Any], until: float, tried: WakeUp | None) -> None:
        try:
            self._backend.run(command, self._attempt_timeout_s())
        except BackendUnavailable:
            again_at = time.monotonic() + _RETRY_S
            if again_at < until:
                # Then it waits among all jobs. So many of them that are due at once do not keep a renewal waiting.
                self.jobs.at(again_at, partial(self.jobs.put, partial(self._attempt, command, until, None)))
        except AgentPerfError as error:
            _log.warning("giving a lease back: %s", error)
        finally:
            if tried is not None:
                tried.send()

    def _renew_due(self) -> None:
        now = time.monotonic()
        due: dict[tuple[Pool, float], list[Lease]] = {}
        for lease in self.held():
            if now >= lease.valid_until:
                over = now >= lease.hold_until
                lease.lose("it was held longer than max_hold" if over else "it could not be renewed in time")
            elif lease.renew_at - now <= lease.ttl * _AHEAD and now < lease.hold_until:
                due.setdefault((lease.pool, lease.ttl), []).append(lease)
        batches = [
            (leases[at : at + commands.MANY], pool, ttl)
            for (pool, ttl), leases in due.items()
            for at in range(0, len(leases), commands.MANY)
        ]
        if batches:
            self._renew(batches)
        held = self.held()
        now = time.monotonic()
        soonest = min(
            (lease.renew_at if now < lease.hold_until else lease.valid_until for lease in held), default=math.inf
        )
        self.jobs.at(soonest, self._renew_due)

    def _renew(self, batches: list[tuple[list[Lease], Pool, float]]) -> None:
        budget_s = _ATTEMPT_TIMEOUT_SHARE * min(ttl for _, _, ttl in batches)
        for leases, pool, ttl in batches:
            # One at a time, and each with half of what patience is left: a Cluster node that does not answer must not
            # cost the leases on the others.
            asked_at = time.monotonic()
            command = commands.renew(pool, [lease.token for lease in leases], math.ceil(ttl * 1000))
            try:
                answer = self._backend.run(command, min(self._backend.deadline, max(_MIN_PATIENCE_S, budget_s / 2)))
            except AgentPerfError:
                budget_s -= time.monotonic() - asked_at
                for lease in leases:
                    lease.renew_at = min(time.monotonic() + ttl / 10, lease.valid_until)
                continue
            for lease in leases:
                if lease.token in answer:
                    lease.lose("it was released by another, or expired before it was renewed")
                    self.registrations.look_soon()
                else:
                    lease.valid_until = asked_at + ttl
                    lease.renew_at = asked_at + ttl / 3

    def _attempt_timeout_s(self) -> float:
        """Return how long to wait for what is not a renewal, lest renewals be late."""
        shortest = min((lease.ttl for lease in self.held()), default=math.inf)
        return min(self._backend.deadline, max(_MIN_PATIENCE_S, _ATTEMPT_TIMEOUT_SHARE / 2 * shortest))

    def _start_over(self) -> None:
        """The server came back empty, so leases are lost. On whatever thread noticed."""
        for lease in self.held():
            lease.lose("the server came back without its data")


def lease_keeper_of(backend: Backend) -> LeaseKeeper:
    """Return the lease keeper of this process for a backend."""
    return backend.share("lb-lease-keeper", lambda: LeaseKeeper(backend))
