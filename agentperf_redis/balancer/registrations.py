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
from agentperf_redis.balancer.commands import Division, Pool, PoolIsDivided, Rates, RegisterReply, TooLate
from agentperf_redis.balancer.layouts import Layout, layouts_of, over_shards
from agentperf_redis.balancer.model import AgentInstance, LoadBalancingStrategy
from agentperf_redis.balancer.server_clock import ServerClock
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Command, Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument

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
        self.layouts = layouts_of(backend)
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
        """Restore a pool: register again the instances that it lost, and forget those that other processes removed.

        Args:
            pool: the whole pool, as a `Pool` with one shard; or a shard, to restore only the instances in this shard.

        Returns:
            Whether this process now has instances registered in the pool or shard.
        """
        whole, layout = self.layouts.whole(pool), self.layouts.of(pool)
        shards = layout.shards if pool.shards == 1 else (pool,)
        lost: list[str] = []
        away: BackendUnavailable | None = None
        for shard in shards:
            try:
                lost += yield from self._lost_in(shard, layout)
            except BackendUnavailable as error:  # raised below, after the other shards are restored
                away = error
        if layout.is_divided and pool.shards == 1 and self._mine_in(whole, layout):
            # Another process may have found the pool empty and set the division to expire in a day (`_let_lapse` in
            # flows/instances.py). If that process died before it counted the instances again, only this call keeps the
            # division.
            division = yield from self._divide(whole, len(layout.shards), None, None)
            self.layouts.learn(pool.agent_type, division.shards)
        for name in lost:
            yield from self._register_again(whole, name)
        if lost:
            _log.warning("registered %d instances of %s again after the server lost them", len(lost), pool.agent_type)
        if away is not None:
            raise away
        return bool(self._mine_in(pool, layout))

    def _mine_in(self, pool: Pool, layout: Layout) -> dict[str, Registered]:
        """Return this process's registrations in a whole pool or in one shard, by instance id."""
        return {
            name: known
            for (of, name), known in list(self.registered.items())
            if of == pool.agent_type and (pool.shards == 1 or layout.home(name) == pool)
        }

    def _lost_in(self, shard: Pool, layout: Layout) -> Flow[list[str]]:
        """Return this process's instances that a shard lost. Forget those that other processes removed."""
        mine = self._mine_in(shard, layout)
        lost: list[str] = []
        names = list(mine)
        for at in range(0, len(names), commands.MANY):
            some = names[at : at + commands.MANY]
            born, found = yield from commands.find_registered(shard, some)
            for name, registered in zip(some, found, strict=True):
                same = self.registered.get((shard.agent_type, name)) is mine[name]
                if not registered and mine[name].born != born:
                    lost.append(name)
                elif same and registered and mine[name].born != born:
                    self.registered[shard.agent_type, name] = replace(mine[name], born=born)
                elif same and not registered:
                    del self.registered[shard.agent_type, name]
        return lost

    def place(self, pool: Pool, known: Registered) -> Flow[RegisterReply]:
        """Register an instance in its shard. The reply has the whole pool's settings that this call replaced.

        Args:
            pool: the whole pool, as a `Pool` with one shard.
            known: the registration.
        """
        return (yield from over_shards(self.layouts, pool, partial(self._place_in, pool, known)))

    def _place_in(self, pool: Pool, known: Registered, layout: Layout) -> Flow[RegisterReply]:
        home = layout.home(known.instance.id)
        if not layout.is_divided:
            return (yield from self._clock.before_deadline(home, partial(registration, home, known)))
        shards = len(layout.shards)
        division = yield from self._divide(pool, shards, known.strategy, known.settings)
        if division.shards != shards:
            raise PoolIsDivided(pool.agent_type, division.shards)
        placed = replace(known, strategy=division.strategy, settings=division.settings)
        reply = yield from self._clock.before_deadline(home, partial(registration, home, placed))
        if reply.is_first:
            # Meanwhile, another process may have deleted the pool, or may have set its division to expire.
            confirmed = yield from self._divide(pool, shards, division.strategy, known.settings)
            if confirmed.shards != shards:
                yield from self._clock.before_deadline(home, partial(commands.remove, home, known.instance.id))
                raise PoolIsDivided(pool.agent_type, confirmed.shards)
        return replace(reply, replaced=division.replaced)

    def divide(
        self, pool: Pool, shards: int, strategy: LoadBalancingStrategy | None, settings: PoolSettings | None
    ) -> Flow[str]:
        """Divide a pool into shards, unless it already has this number of shards.

        Args:
            pool: the whole pool, as a `Pool` with one shard.
            shards: the number of shards.
            strategy: the strategy that the pool must have; None for any.
            settings: the settings of the pool; None keeps the settings of an existing pool.

        Returns:
            The settings that this call replaced, packed; empty if it replaced none.

        Raises:
            InvalidArgument: when the pool has another number of shards or another strategy.
        """
        done = yield from self._divide(pool, shards, strategy, settings)
        if done.shards != shards:
            raise InvalidArgument(
                "shards",
                shards,
                f"{done.shards}, the number of shards of the pool {pool.agent_type!r}; to change it, delete the pool, "
                "or remove all its instances",
            )
        self.layouts.learn(pool.agent_type, shards)
        return done.replaced

    def _divide(
        self, pool: Pool, shards: int, strategy: LoadBalancingStrategy | None, settings: PoolSettings | None
    ) -> Flow[Division]:
        request = partial(commands.divide, pool, "set", shards, strategy, settings)
        return (yield from self._clock.before_deadline(pool, request))

    def deploy(self, pool: Pool, settings: PoolSettings) -> Flow[str]:
        """Set the settings of a pool, and apply them to its instances page by page.

        Args:
            pool: the whole pool, as a `Pool` with one shard.
            settings: the settings.

        Returns:
            The settings that this call replaced, packed; empty if it replaced none.
        """
        return (yield from over_shards(self.layouts, pool, partial(self._deploy_in, pool, settings)))

    def _deploy_in(self, pool: Pool, settings: PoolSettings, layout: Layout) -> Flow[str]:
        before = ""
        if layout.is_divided:
            before = yield from self.divide(pool, len(layout.shards), None, settings)
        for shard in layout.shards:
            rank = 0
            while True:
                request = partial(commands.configure, shard, settings, rank, commands.MANY)
                done = yield from self._clock.before_deadline(shard, request)
                before = before or (done.replaced if rank == 0 else "")
                rank = done.next_rank
                if not rank:
                    break
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
            reply = yield from self.place(pool, known)
            if (pool.agent_type, instance_id) in self.registered:
                self.registered[pool.agent_type, instance_id] = replace(known, born=reply.born)
            if reply.replaced and known.settings is not None:
                yield from self.deploy(pool, known.settings)
