"""The lease keeper renews this process's leases on one background thread, and releases abandoned leases.

The keeper uses a separate thread because event loops may block and worker threads may be busy. It renews a lease when a
third of the lease's TTL is over, together with the pool's other leases that are due. The keeper has only weak
references to leases. So a lease that the user has dropped can be deleted, and is then released.
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

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, register_for_fork
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.history import sample
from agentperf_redis.balancer.layouts import layouts_of
from agentperf_redis.balancer.lease import Lease, keepers
from agentperf_redis.balancer.model import AttachedLease
from agentperf_redis.balancer.registrations import Registrations
from agentperf_redis.balancer.server_clock import clock_of
from agentperf_redis.command import Batch, Command, Flow, Wait, WakeUp
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, LeaseLost
from agentperf_redis.history import Sampler
from agentperf_redis.presence import presence_of
from agentperf_redis.transport.exchange import CLOSED

_log = logging.getLogger("agentperf_redis")

TOMBSTONE_S = 60.0
"""How long the server refuses the token of a request after the last copy of the request could have arrived, s."""
_AHEAD = 0.1
"""When a lease is renewed, leases that become due within this share of their TTL are renewed in the same batch."""
_ATTEMPT_TIMEOUT_SHARE = 0.3
"""Share of the shortest TTL that one round of renewals may spend on requests that fail.

When a round begins, two thirds of the TTL are left.
"""
_MIN_ATTEMPT_TIMEOUT_S = 0.02
_CLOSE_S = 5.0
_RETRY_S = 0.5
_EXTEND_S = 2.0
"""How long `extend` waits for the background thread, in addition to the deadline of a request, s."""


def _notify(on_lost: Callable[[LeaseLost], object], loss: LeaseLost) -> None:
    arguments.refuse_unfinished("on_lost", on_lost, on_lost(loss))


class LeaseKeeper:
    """Renews the leases of one process on one backend. `lease_keeper_of` returns the keeper of a backend.

    Args:
        backend: the server and namespace.

    Attributes:
        jobs: the background thread of the keeper.
        registrations: the registrations of this process on the backend. The thread of `jobs` restores them.
        layouts: the shards of the pools.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.jobs = Background("agentperf-balancer")
        self._sampler = Sampler(backend, self.jobs, self._samples, self._attempt_timeout_s, self._pools_in_use)
        self.registrations = Registrations(backend, clock_of(backend), self.jobs, self._attempt_timeout_s)
        self.layouts = layouts_of(backend)
        self._presence = presence_of(backend)
        self._presence.leases = lambda: len(self.held())
        self.after_fork()
        keepers.add(self)
        backend.on_new_epoch(self._start_over)
        backend.on_close(self.close)
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: start without leases. The parent continues to renew its leases."""
        # Each access to `_held` is one atomic operation. So no lock is needed, even if a signal handler or `__del__`
        # runs between two accesses.
        self._held: dict[str, weakref.ref[Lease]] = {}
        self._last_releases: list[Command[Any]] = []
        self._closed = False
        self._numbers = itertools.count(1)

    def used(self, pool: Pool) -> None:
        """Sample a pool for its history: in the next slice, and as long as this process holds leases of the pool.

        Args:
            pool: any shard of the pool. All shards of the pool are sampled, because the history is a sum over them.
        """
        self._sampler.used(pool.agent_type, pool)

    def _pools_in_use(self) -> dict[str, Pool]:
        return {lease.pool.agent_type: lease.pool for lease in self.held()}

    def _samples(self, pool: Pool) -> tuple[Command[int], ...]:
        return tuple(map(sample, self.layouts.of(pool).shards))

    @property
    def deadline(self) -> float:
        """Max seconds of one request, retries included."""
        return self._backend.deadline

    def token(self) -> str:
        """Return a new unique token, which contains the name of this process."""
        return f"@{self._backend.process}:{next(self._numbers):x}"

    def tombstone_ms(self, ttl: float) -> int:
        """Return for how many ms the server must refuse the token of an abandoned request."""
        return math.ceil((max(self._backend.deadline, ttl) + TOMBSTONE_S) * 1000)

    def hold(self, lease: Lease) -> bool:
        """Renew a lease from now on. Returns False when the keeper is closed."""
        self._held[lease.token] = weakref.ref(lease)
        # Check `_closed` only after the lease is in `_held`. `close` first sets `_closed`, then lists the leases. So if
        # `close` has missed this lease, the check finds `_closed` set.
        if self._closed:
            self._held.pop(lease.token, None)
            return False
        self.jobs.at(lease.renew_at, self._renew_due)
        self._presence.begin(self.jobs, self._attempt_timeout_s)
        return True

    def closed_error(self) -> BackendUnavailable:
        """Return the error for a call whose lease was granted after the keeper was closed."""
        return BackendUnavailable(self._backend.address.masked, "not_applied", CLOSED)

    def drop(self, lease: AttachedLease) -> None:
        """Stop renewing a lease."""
        self._held.pop(lease.token, None)

    def held(self) -> list[Lease]:
        """Return the leases that this process holds."""
        return [lease for reference in list(self._held.values()) if (lease := reference()) is not None and lease.held]

    def held_as(self, token: str) -> Lease | None:
        """Return the lease with this token if this process holds it."""
        reference = self._held.get(token)
        lease = None if reference is None else reference()
        return lease if lease is not None and lease.held else None

    def abandon(self, pool: Pool, token: str, instance_id: str) -> bool:
        """Release a lease whose object is being deleted. Takes no lock, so that `__del__` may call it.

        Returns:
            False when this keeper does not renew the lease: the object is a forked copy, or the keeper was closed.
        """
        if self._closed or token not in self._held:
            return False
        self.jobs.put(partial(self._forget, pool, token, instance_id))
        return True

    def undo(self, release: Command[bool] | Batch[bool], ttl: float) -> WakeUp:
        """Release the leases that a request of unknown outcome may have left. Retries while the server is unreachable.

        Returns:
            A wake-up that is sent after the first attempt.
        """
        tried = WakeUp()
        self.retry_in_background(release, ttl, tried)
        return tried

    def retry_in_background(
        self, command: Command[Any] | Batch[Any], seconds: float, tried: WakeUp | None = None
    ) -> None:
        """Run commands on the background thread. Retry them until the server answers, for at most `seconds`."""
        self.jobs.put(partial(self._attempt, command, time.monotonic() + seconds, tried))

    def extend(self, lease: Lease, ttl: float) -> None:
        """Give a lease another TTL."""
        self._backend.run(self._extending(lease, ttl))

    async def aextend(self, lease: Lease, ttl: float) -> None:
        """Like `extend`, without blocking the event loop."""
        await self._backend.arun(self._extending(lease, ttl))

    def _extending(self, lease: Lease, ttl: float) -> Flow[None]:
        # The background thread sends the request, between its renewals. If another thread sent the request, the server
        # could receive an older renewal after the request. That renewal would restore the old TTL.
        done = WakeUp()
        failures: list[AgentPerfError] = []
        self.jobs.put(partial(self._extend, lease, ttl, failures, done))
        if not (yield from Wait(done, self._backend.deadline + _EXTEND_S)):
            raise BackendUnavailable(self._backend.address.masked, "unknown", "the background thread is busy")
        if failures:
            raise failures[0]
        lease.check()
        if not lease.held:
            raise LeaseLost(lease.agent_type, lease.token, "it was released meanwhile")

    def lost(self, lease: Lease, loss: LeaseLost, on_lost: Callable[[LeaseLost], None] | None) -> None:
        """Report that a lease is lost. Called once per lease."""
        self.drop(lease)
        _log.warning("%s", loss)
        if on_lost is not None:
            # Always call the user's function on the background thread, so that it cannot block an event loop.
            self.jobs.put(partial(_notify, on_lost, loss))

    def close(self) -> None:
        """Release all held leases, run pending retries once, and end the thread.

        If `SystemExit` or `KeyboardInterrupt` of a signal handler ends this call early, the next call continues.
        """
        self._closed = True  # from now on, `hold` refuses leases
        for lease in self.held():
            self.release_last(commands.release(lease.pool, lease.token, lease.instance_id), lease.end)
        self.send_last_releases()
        self.jobs.close(_CLOSE_S)

    def release_last(self, release: Command[Any], end: Callable[[], bool]) -> None:
        """End a lease of a closing process. Its release is sent by `send_last_releases`.

        Args:
            release: the release.
            end: ends the lease in this process. Returns whether this process held it until now.
        """
        self._last_releases.append(release)  # before `end`, because a signal handler may raise an exception afterwards
        if not end():
            self._forget_releases(release)

    def send_last_releases(self) -> None:
        """Send the releases of `release_last`. Errors are ignored. A repeated release has no effect."""
        releases = tuple(self._last_releases)
        if releases:
            with contextlib.suppress(AgentPerfError):
                self._backend.run(Batch(releases).settled())
            self._forget_releases(*releases)

    def _forget_releases(self, *releases: Command[Any]) -> None:
        for release in releases:
            with contextlib.suppress(ValueError):  # another thread that closes has forgotten it already
                self._last_releases.remove(release)

    # The methods below run on the background thread, except `_start_over`.

    def _forget(self, pool: Pool, token: str, instance_id: str) -> None:
        self._held.pop(token, None)
        _log.warning(
            "the lease on %r of %r was released because nothing refers to it; keep the return value of acquire, "
            "or use `with lb.lease(...)`",
            instance_id,
            pool.agent_type,
        )
        self.retry_in_background(commands.release(pool, token, instance_id), TOMBSTONE_S)

    def _extend(self, lease: Lease, ttl: float, failures: list[AgentPerfError], done: WakeUp) -> None:
        try:
            if lease.held:
                sent_at = time.monotonic()
                command = commands.extend(lease.pool, lease.token, math.ceil(ttl * 1000))
                if self._backend.run(command, self._attempt_timeout_s()):
                    lease.ttl, lease.valid_until, lease.renew_at = ttl, sent_at + ttl, sent_at + ttl / 3
                    self.jobs.at(lease.renew_at, self._renew_due)
                else:
                    lease.lose("another caller released it, or it expired before it was extended")
        except AgentPerfError as error:
            failures.append(error)
        finally:
            done.send()

    def _attempt(self, command: Command[Any] | Batch[Any], until: float, tried: WakeUp | None) -> None:
        try:
            self._backend.run(command, self._attempt_timeout_s())
        except BackendUnavailable:
            again_at = time.monotonic() + _RETRY_S
            if again_at < until:
                # A retry that becomes due is put behind all waiting jobs. So even many retries at the same time do not
                # delay a renewal.
                self.jobs.at(again_at, partial(self.jobs.put, partial(self._attempt, command, until, None)))
        except AgentPerfError as error:
            _log.warning("could not release a lease: %s", error)
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
            # Send one batch at a time. Limit its timeout to half of the remaining budget, but allow at least the
            # minimum timeout. So an unresponsive Cluster node does not cause the loss of leases on the other nodes.
            sent_at = time.monotonic()
            command = commands.renew(pool, [lease.token for lease in leases], math.ceil(ttl * 1000))
            try:
                answer = self._backend.run(
                    command, min(self._backend.deadline, max(_MIN_ATTEMPT_TIMEOUT_S, budget_s / 2))
                )
            except AgentPerfError:
                budget_s -= time.monotonic() - sent_at
                for lease in leases:
                    lease.renew_at = min(time.monotonic() + ttl / 10, lease.valid_until)
                continue
            for lease in leases:
                if lease.token in answer:
                    lease.lose("another caller released it, or it expired before it was renewed")
                    self.registrations.restore_soon()
                else:
                    lease.valid_until = sent_at + ttl
                    lease.renew_at = sent_at + ttl / 3

    def _attempt_timeout_s(self) -> float:
        """Return the max seconds that the background thread may wait for a request other than a renewal.

        The limit ensures that such a request does not make renewals late.
        """
        shortest = min((lease.ttl for lease in self.held()), default=math.inf)
        return min(self._backend.deadline, max(_MIN_ATTEMPT_TIMEOUT_S, _ATTEMPT_TIMEOUT_SHARE / 2 * shortest))

    def _start_over(self) -> None:
        """Mark all leases lost, because the server lost its data. Runs on the thread that detected the loss."""
        for lease in self.held():
            lease.lose("the server lost its data")


def lease_keeper_of(backend: Backend) -> LeaseKeeper:
    """Return the lease keeper of this process for a backend."""
    return backend.share("lb-lease-keeper", lambda: LeaseKeeper(backend))
