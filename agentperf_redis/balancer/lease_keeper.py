"""Keeps the leases of this process alive, on one thread, and its instances registered.

Event loops block and workers compute, so leases are renewed by a thread of their own, in one batch a pool, when a third
of their life is over. The keeper refers to leases weakly: it must not keep alive what its user has dropped.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool, Rates, TooLate
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import LeaseOnIt
from agentperf_redis.balancer.registrations import Registered, registration
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Batch, Command, Flow, Hint
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, LeaseLost
from agentperf_redis.transport.executor import CLOSED

T = TypeVar("T")

_log = logging.getLogger("agentperf_redis")

TOMBSTONE_S = 60.0
"""How long after a call could still arrive its token is refused, s. A clock of its own, not of the network's."""
_AHEAD = 0.1
"""Leases due within this share of their life are renewed along with the one that is due, in one batch."""
_PATIENCE = 0.3
"""Share of the shortest life that one round of renewals may wait in vain, s; two thirds are left when it begins."""
_LEAST_PATIENCE_S = 0.02
_CLOSE_S = 5.0
_RETRY_S = 0.5
_CLOCK_READINGS = 3

_LOOK_S = 3.0
"""How often to look whether the server still has what this process registered."""

Job = Callable[[], object]


class Keeper:
    """One per backend and process; see `keeper_of`.

    Args:
        backend: through which it renews and gives back.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.registered: dict[tuple[str, str], Registered] = {}
        """By agent type and id."""
        self._server_ahead_ms: dict[str, float] = {}
        """By agent type: the server's clock less `time.monotonic`, at most."""
        self._reset()
        backend.on_new_epoch(self._start_over)
        backend.on_close(self.close)
        _keepers.add(self)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._held: dict[str, weakref.ref[Lease]] = {}
        # The one queue whose put may interrupt itself, as Lease.__del__ does when memory is collected at any moment.
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._wake_at = math.inf
        self._look_at = math.inf
        self._delayed: list[tuple[float, int, Job]] = []
        self._closed = False
        self._numbers = itertools.count(1)

    @property
    def deadline(self) -> float:
        """Seconds that one request may take in all."""
        return self._backend.deadline

    def timely(self, pool: Pool, request: Callable[[int], Command[T | TooLate]]) -> Flow[T]:
        """Make a request that is void, by the server's clock, once its caller has given up.

        So no copy of it that arrives late undoes what others have done since.

        Args:
            pool: what it is about; in a Cluster, each has the clock of its node.
            request: makes it, from its limit.
        """
        for _ in range(_CLOCK_READINGS):
            asked_at = time.monotonic()
            # Before anything is known of the clock the limit is long past, and the refusal tells the time.
            ahead_ms = self._server_ahead_ms.get(pool.agent_type, 0.0)
            answer = yield from request(math.ceil(ahead_ms + (asked_at + self._backend.deadline) * 1000))
            if not isinstance(answer, TooLate):
                return answer
            self._server_ahead_ms[pool.agent_type] = answer.now_ms + 1 - asked_at * 1000
        raise BackendUnavailable(self._backend.address.masked, "not_applied", "requests arrived too late each time")

    def token(self) -> str:
        """Return a new token: unique, and readable as the process that asks."""
        return f"@{self._backend.process}:{next(self._numbers):x}"

    def bury_ms(self, ttl: float) -> int:
        """Return how long the token of an abandoned request has to be refused, ms."""
        return math.ceil((max(self._backend.deadline, ttl) + TOMBSTONE_S) * 1000)

    def hold(self, lease: Lease) -> bool:
        """Keep a lease alive from now on. Returns False when all was closed meanwhile."""
        with self._lock:
            if self._closed:
                return False
            self._held[lease.token] = weakref.ref(lease)
            if self._thread is None:
                self._start()
            sooner = lease.renew_at < self._wake_at
            if sooner:
                self._wake_at = lease.renew_at
        if sooner:
            self._inbox.put(None)
        return True

    def closed_error(self) -> BackendUnavailable:
        """Return what a caller is told who was granted a lease while all was closed."""
        return BackendUnavailable(self._backend.address.masked, "not_applied", CLOSED)

    def drop(self, lease: LeaseOnIt) -> None:
        """Renew a lease no more."""
        with self._lock:
            self._held.pop(lease.token, None)

    def held(self) -> list[Lease]:
        """Return the leases this process holds."""
        with self._lock:
            references = list(self._held.values())
        return [lease for reference in references if (lease := reference()) is not None and lease.held]

    def remember(self, known: Registered) -> None:
        """Register this instance again should the server lose it."""
        instance = known.instance
        self.registered[instance.agent_type, instance.id] = replace(known, instance=replace(instance, lease=None))
        if self._look_at == math.inf:
            self.later(self._look_around)

    def look(self, pool: Pool) -> Flow[bool]:
        """Register again what the server lost of a pool, and forget what somebody else took out of it.

        Returns:
            Whether anything of it is registered now.
        """
        mine = {name: known for (of, name), known in list(self.registered.items()) if of == pool.agent_type}
        lost: list[str] = []
        names = list(mine)
        for at in range(0, len(names), commands.MANY):
            some = names[at : at + commands.MANY]
            born, found = yield from commands.look(pool, some)
            for name, registered in zip(some, found, strict=True):
                same = self.registered.get((pool.agent_type, name)) is mine[name]
                if not registered and mine[name].born != born:
                    lost.append(name)
                elif same and registered and mine[name].born != born:
                    self.registered[pool.agent_type, name] = replace(mine[name], born=born)
                elif same and not registered:
                    del self.registered[pool.agent_type, name]
        for name in lost:
            yield from self._registration(pool, name)
        if lost:
            _log.warning("registered %d instances of %s again, which the server had lost", len(lost), pool.agent_type)
        return any(of == pool.agent_type for of, _ in list(self.registered))

    def deploy(self, pool: Pool, settings: PoolSettings) -> Flow[str]:
        """Give a pool settings, and have its instances follow them, page by page.

        Returns:
            The settings it had, packed; empty for none.
        """
        done = yield from self.timely(pool, partial(commands.configure, pool, settings, 0, commands.MANY))
        before = done.replaced
        while done.next_rank:
            request = partial(commands.configure, pool, settings, done.next_rank, commands.MANY)
            done = yield from self.timely(pool, request)
        return before

    def amend(
        self,
        agent_type: str,
        instance_id: str,
        *,
        max_capacity: int | None,
        weight: float | None,
        labels: frozenset[str] | None,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
    ) -> None:
        """Take a change of an instance into what is remembered of it."""
        known = self.registered.get((agent_type, instance_id))
        if known is not None:
            rates = Rates(
                known.rates.requests_per_minute if requests_per_minute is None else requests_per_minute,
                known.rates.tokens_per_minute if tokens_per_minute is None else tokens_per_minute,
            )
            known = replace(known, rates=rates)
            changes: dict[str, Any] = {"max_capacity": max_capacity, "weight": weight, "labels": labels}
            self._alter(known, **{name: value for name, value in changes.items() if value is not None})

    def configured(self, agent_type: str, settings: PoolSettings) -> None:
        """Found a pool with these settings, should the server lose it."""
        for known in list(self.registered.values()):
            if known.instance.agent_type == agent_type:
                self.registered[agent_type, known.instance.id] = replace(known, settings=settings)

    def mark(self, agent_type: str, instance_id: str, *, on: str, off: str) -> None:
        """Take flags that were set and cleared into what is remembered of an instance."""
        known = self.registered.get((agent_type, instance_id))
        if known is not None:
            set_flags, flags = on.split(","), f"{on},{off}".split(",")
            if "unhealthy" in flags:
                known = self._alter(known, is_healthy="unhealthy" not in set_flags)
            if "draining" in flags:
                self._alter(known, is_draining="draining" in set_flags)

    def _alter(self, known: Registered, **changes: Any) -> Registered:
        changed = replace(known, instance=replace(known.instance, **changes))
        self.registered[known.instance.agent_type, known.instance.id] = changed
        return changed

    def later(self, job: Job) -> None:
        """Have a job done on the keeper's thread."""
        with self._lock:
            if self._thread is None:
                self._start()
            self._inbox.put(job)

    def abandon(self, pool: Pool, token: str, instance_id: str) -> bool:
        """Give back a lease whose object is gone. Takes no lock, and so may be called from `__del__`.

        Returns:
            False when it is none of this keeper's business: the object came with a fork, or all was closed before.
        """
        if self._closed or token not in self._held:
            return False
        self._inbox.put(partial(self._forget, pool, token, instance_id))
        return True

    def compensate(self, pool: Pool, token: str, ttl: float) -> Hint:
        """See to it that a request of unknown outcome leaves no lease behind, however long the server is away.

        Returns:
            Given once that was tried.
        """
        tried = Hint()
        self.insist(commands.release(pool, token, bury_ms=self.bury_ms(ttl)), ttl, tried)
        return tried

    def insist(self, command: Command[Any], seconds: float, tried: Hint | None = None) -> None:
        """Run a command on the keeper's thread until the server answers, or this time is over."""
        until = time.monotonic() + seconds

        def attempt() -> None:
            try:
                self._backend.run(command, self._patience_s())
            except BackendUnavailable:
                again_at = time.monotonic() + _RETRY_S
                if again_at < until:
                    heapq.heappush(self._delayed, (again_at, next(self._numbers), attempt))
            except AgentPerfError as error:
                _log.warning("giving a lease back: %s", error)
            finally:
                if tried is not None:
                    tried.give()

        self.later(attempt)

    def lost(self, lease: Lease, loss: LeaseLost, on_lost: Callable[[LeaseLost], None] | None) -> None:
        """Report a lost lease, once."""
        self.drop(lease)
        _log.warning("%s", loss)
        if on_lost is not None:
            # On the keeper's thread, whoever noticed: an event loop must not be held up by what users do here.
            self.later(partial(on_lost, loss))

    def close(self) -> None:
        """Give back what is still held, do what was put off, once, and end the thread."""
        if self._pid != os.getpid() or self._closed:
            return
        with self._lock:
            self._closed = True  # no lease is taken in from here on
        leases = [lease for lease in self.held() if lease.end()]
        with contextlib.suppress(AgentPerfError):
            if leases:
                self._backend.run(
                    Batch(
                        tuple(commands.release(lease.pool, lease.token, lease.instance_id) for lease in leases)
                    ).settled()
                )
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._inbox.put(None)
            thread.join(_CLOSE_S)

    # Everything below runs on the keeper's thread.

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="agentperf-keeper", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while self._goes_on():
            next_at = min(self._wake_at, self._look_at, self._delayed[0][0] if self._delayed else math.inf)
            pause = None if next_at == math.inf else max(0.0, next_at - time.monotonic())
            jobs: list[Job] = []
            with contextlib.suppress(Empty):
                jobs = [job for job in (self._inbox.get(timeout=pause),) if job is not None]
            while self._delayed and self._delayed[0][0] <= time.monotonic():
                jobs.append(heapq.heappop(self._delayed)[2])
            if self._look_at <= time.monotonic():
                jobs.append(self._look_around)
            self._do((*jobs, self._renew_due))

    def _goes_on(self) -> bool:
        """Whether there is more to do. After `close`, what is left is done here, once; a later job starts anew."""
        while self._closed:
            jobs = [job for _, _, job in self._delayed]
            self._delayed.clear()
            with contextlib.suppress(Empty):
                while True:
                    job = self._inbox.get_nowait()
                    jobs += [job] if job is not None else []
            self._do(jobs)
            self._delayed.clear()  # tried, in vain; the leases expire
            with self._lock:
                if self._inbox.empty():
                    self._thread = None
                    return False
        return True

    @staticmethod
    def _do(jobs: Iterable[Job]) -> None:
        for job in jobs:
            try:
                job()
            except Exception:  # noqa: BLE001  the thread has to outlive any single failure
                _log.exception("the keeper of leases met an error")

    def _forget(self, pool: Pool, token: str, instance_id: str) -> None:
        with self._lock:
            self._held.pop(token, None)
        _log.warning(
            "the lease on %r of %r was given back because nothing refers to it any more; keep what acquire returned, "
            "or use `with lb.lease(...)`",
            instance_id,
            pool.agent_type,
        )
        self.insist(commands.release(pool, token, instance_id), TOMBSTONE_S)

    def _renew_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            # Kept until it is reached even when all leases are gone by then: setting it to never would have every
            # short lease wake this thread.
            if now < self._wake_at:
                return
            self._wake_at = math.inf
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
        with self._lock:
            self._wake_at = min(self._wake_at, soonest)

    def _renew(self, batches: list[tuple[list[Lease], Pool, float]]) -> None:
        budget_s = _PATIENCE * min(ttl for _, _, ttl in batches)
        for leases, pool, ttl in batches:
            # One at a time, and each with half of what patience is left: a Cluster node that does not answer must not
            # cost the leases on the others.
            asked_at = time.monotonic()
            command = commands.renew(pool, [lease.token for lease in leases], math.ceil(ttl * 1000))
            try:
                answer = self._backend.run(command, min(self._backend.deadline, max(_LEAST_PATIENCE_S, budget_s / 2)))
            except AgentPerfError:
                budget_s -= time.monotonic() - asked_at
                for lease in leases:
                    lease.renew_at = min(time.monotonic() + ttl / 10, lease.valid_until)
                continue
            for lease in leases:
                if lease.token in answer:
                    lease.lose("it was released by another, or expired before it was renewed")
                    self._look_at = min(self._look_at, asked_at) if self.registered else math.inf
                else:
                    lease.valid_until = asked_at + ttl
                    lease.renew_at = asked_at + ttl / 3

    def _start_over(self) -> None:
        """The server came back empty: leases are lost, instances are registered again. On whatever thread noticed."""
        if self._pid != os.getpid():
            return
        for lease in self.held():
            lease.lose("the server came back without its data")
        if self.registered:
            self.later(self._look_around)

    def _look_around(self) -> None:
        """See whether the server still has what was registered: a pool may be lost without a connection being so."""
        for agent_type in {of for of, _ in list(self.registered)}:
            try:
                self._backend.run(self.look(Pool.of(self._backend.namespace, agent_type)), self._patience_s())
            except AgentPerfError as error:  # the next look comes soon
                _log.debug("looking after the instances of %s: %s", agent_type, error)
        self._look_at = time.monotonic() + _LOOK_S if self.registered else math.inf

    def _patience_s(self) -> float:
        """Return how long to wait for what is not a renewal, lest renewals be late."""
        shortest = min((lease.ttl for lease in self.held()), default=math.inf)
        return min(self._backend.deadline, max(_LEAST_PATIENCE_S, _PATIENCE / 2 * shortest))

    def _registration(self, pool: Pool, instance_id: str) -> Flow[None]:
        known = self.registered.get((pool.agent_type, instance_id))
        if known is not None:
            yield from self._backend.enter("lb", pool.agent_type, again=True)
            taken = yield from self.timely(pool, partial(registration, pool, known))
            if (pool.agent_type, instance_id) in self.registered:
                self.registered[pool.agent_type, instance_id] = replace(known, born=taken.born)
            if taken.replaced and known.settings is not None:
                yield from self.deploy(pool, known.settings)


def keeper_of(backend: Backend) -> Keeper:
    """Return the keeper of this process for a backend."""
    return backend.share("lb-keeper", lambda: Keeper(backend))


_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for keeper in list(_keepers):
        keeper._reset()  # noqa: SLF001  the parent keeps renewing what it holds; the child begins with nothing


os.register_at_fork(after_in_child=_after_fork_in_child)
