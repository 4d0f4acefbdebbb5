"""The registrations of a process.

A process remembers the instances that it registered, and its later changes to them. If the server loses an instance,
the process registers it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.background import Background
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool, Rates, RegisterReply, TooLate
from agentperf_redis.balancer.model import AgentInstance, LoadBalancingStrategy
from agentperf_redis.balancer.server_clock import ServerClock
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Command, Flow
from agentperf_redis.errors import AgentPerfError

_log = logging.getLogger("agentperf_redis")

_CHECK_EVERY_S = 3.0
"""How often to check that the server still has this process's registrations."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A registration by this process, remembered in order to repeat it if the server loses the instance.

    Attributes:
        instance: the instance, including the changes that this process has made since its registration.
        strategy: the strategy that the pool must have; None accepts any strategy.
        heartbeat_ttl_ms: the instance takes no work after this many ms without a heartbeat; 0 when no heartbeat is
            expected.
        rates: the rate limits of the instance.
        settings: the settings of the pool; None keeps the settings of an existing pool.
        born: creation time of the pool, us. A different value on the server means that the server lost the pool.
    """

    instance: AgentInstance
    strategy: LoadBalancingStrategy | None
    heartbeat_ttl_ms: int
    rates: Rates
    settings: PoolSettings | None
    born: int


def registration(pool: Pool, known: Registered, until_ms: int) -> Command[RegisterReply | TooLate]:
    """Return the request that registers an instance."""
    return commands.register(
        pool,
        known.instance,
        known.strategy,
        known.heartbeat_ttl_ms,
        until_ms,
        rates=known.rates,
        settings=known.settings,
    )


class Registrations:
    """The instances that this process registered with one backend.

    Args:
        backend: the server and namespace.
        clock: estimates of the clocks of the backend's servers.
        jobs: the background thread that restores lost instances.
        attempt_timeout_s: returns the max seconds that the background thread may wait for one reply.
    """

    def __init__(
        self, backend: Backend, clock: ServerClock, jobs: Background, attempt_timeout_s: Callable[[], float]
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._jobs = jobs
        self._attempt_timeout_s = attempt_timeout_s
        self.registered: dict[tuple[str, str], Registered] = {}
        """Registrations by agent type and instance id."""
        backend.on_new_epoch(self.restore_soon)

    def remember(self, known: Registered) -> None:
        """Remember a registration, to repeat it if the server loses the instance."""
        instance = known.instance
        self.registered[instance.agent_type, instance.id] = replace(known, instance=replace(instance, lease=None))
        self._jobs.at(time.monotonic() + _CHECK_EVERY_S, self._restore_all)

    def forget(self, agent_type: str, instance_id: str) -> None:
        """Forget a registration, so that it is not repeated."""
        self.registered.pop((agent_type, instance_id), None)

    def restore(self, pool: Pool) -> Flow[bool]:
        """Restore a pool: register again the instances that the server lost, and forget those that others removed.

        Returns:
            Whether this process now has instances registered in the pool.
        """
        mine = {name: known for (of, name), known in list(self.registered.items()) if of == pool.agent_type}
        lost: list[str] = []
        names = list(mine)
        for at in range(0, len(names), commands.MANY):
            some = names[at : at + commands.MANY]
            born, found = yield from commands.find_registered(pool, some)
            for name, registered in zip(some, found, strict=True):
                same = self.registered.get((pool.agent_type, name)) is mine[name]
                if not registered and mine[name].born != born:
                    lost.append(name)
                elif same and registered and mine[name].born != born:
                    self.registered[pool.agent_type, name] = replace(mine[name], born=born)
                elif same and not registered:
                    del self.registered[pool.agent_type, name]
        for name in lost:
            yield from self._register_again(pool, name)
        if lost:
            _log.warning("registered %d instances of %s again after the server lost them", len(lost), pool.agent_type)
        return any(of == pool.agent_type for of, _ in list(self.registered))

    def deploy(self, pool: Pool, settings: PoolSettings) -> Flow[str]:
        """Set the settings of a pool, and apply them to its instances page by page.

        Returns:
            The replaced settings, packed; empty if there were none.
        """
        done = yield from self._clock.before_deadline(
            pool, partial(commands.configure, pool, settings, 0, commands.MANY)
        )
        before = done.replaced
        while done.next_rank:
            request = partial(commands.configure, pool, settings, done.next_rank, commands.MANY)
            done = yield from self._clock.before_deadline(pool, request)
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
        """Apply a change to the remembered instance. An argument that is None keeps the old value."""
        known = self.registered.get((agent_type, instance_id))
        if known is not None:
            rates = Rates(
                known.rates.requests_per_minute if requests_per_minute is None else requests_per_minute,
                known.rates.tokens_per_minute if tokens_per_minute is None else tokens_per_minute,
            )
            known = replace(known, rates=rates)
            changes: dict[str, Any] = {"max_capacity": max_capacity, "weight": weight, "labels": labels}
            self._alter(known, **{name: value for name, value in changes.items() if value is not None})

    def remember_settings(self, agent_type: str, settings: PoolSettings) -> None:
        """Remember the new settings of a pool. If the server loses the pool, it is created again with them."""
        for known in list(self.registered.values()):
            if known.instance.agent_type == agent_type:
                self.registered[agent_type, known.instance.id] = replace(known, settings=settings)

    def mark(self, agent_type: str, instance_id: str, *, on: str, off: str) -> None:
        """Set and clear the same flags on the remembered instance as on the server."""
        known = self.registered.get((agent_type, instance_id))
        if known is not None:
            set_flags, flags = on.split(","), f"{on},{off}".split(",")
            if "unhealthy" in flags:
                known = self._alter(known, is_healthy="unhealthy" not in set_flags)
            if "draining" in flags:
                self._alter(known, is_draining="draining" in set_flags)

    def restore_soon(self) -> None:
        """Schedule an immediate check for lost registrations on the background thread. Does no I/O itself."""
        if self.registered:
            self._jobs.at(time.monotonic(), self._restore_all)

    def _alter(self, known: Registered, **changes: Any) -> Registered:
        changed = replace(known, instance=replace(known.instance, **changes))
        self.registered[known.instance.agent_type, known.instance.id] = changed
        return changed

    def _restore_all(self) -> None:
        """Restore lost registrations. Runs regularly, since a server may lose a pool while connections stay open."""
        if self._jobs.closing:
            return
        for agent_type in {of for of, _ in list(self.registered)}:
            try:
                self._backend.run(self.restore(Pool.of(self._backend.namespace, agent_type)), self._attempt_timeout_s())
            except AgentPerfError as error:  # retried by the next check
                _log.debug("could not restore the instances of %s: %s", agent_type, error)
        if self.registered:
            self._jobs.at(time.monotonic() + _CHECK_EVERY_S, self._restore_all)

    def _register_again(self, pool: Pool, instance_id: str) -> Flow[None]:
        known = self.registered.get((pool.agent_type, instance_id))
        if known is not None:
            yield from self._backend.enter("lb", pool.agent_type, again=True)
            reply = yield from self._clock.before_deadline(pool, partial(registration, pool, known))
            if (pool.agent_type, instance_id) in self.registered:
                self.registered[pool.agent_type, instance_id] = replace(known, born=reply.born)
            if reply.replaced and known.settings is not None:
                yield from self.deploy(pool, known.settings)
