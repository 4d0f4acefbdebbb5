"""The shards of each pool, as this process knows them, and the share of their capacity that is free.

A pool with several shards may use several nodes of a Cluster. Each instance lies in one shard. The number of shards is
stored under the keys that the pool would have with one shard. A process that does not know the number sends its first
request to these keys, and learns the number from the refusal. Most pools have one shard. Their requests are not
refused, so this costs them nothing.

A flow for a whole pool takes a `Pool` with one shard, and runs over the layout of the pool:

    done = yield from over_shards(layouts, pool, lambda layout: commands.remove(layout.home(name), name))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from zlib import crc32

from agentperf_redis import random_numbers
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool, PoolIsDivided
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable

T = TypeVar("T")

_HEARD_S = 1.0
"""For this many seconds, the load that a shard has reported is used to choose a shard.

Without this limit, a shard that was once full would never be picked first again. So it would never report that it has
free capacity.
"""
_AWAY_S = 3.0
"""For this many seconds after a failure to reach a shard, calls try the other shards first."""
_PARTS = 16
_MAX_KNOWN = 4096
"""Maximum number of pools whose layouts are kept, since a caller may choose any number of names. At this number, all
layouts are forgotten. The next request for each pool with several shards is then refused once, and sent again."""
_CHANGES = 3
"""Max attempts of one operation while the number of shards changes. The number changes rarely, and only by hand."""


class Layout:
    """The shards of a pool, and what this process last heard from each of them. The methods take no lock.

    A lease may have been granted before the number of shards changed. Therefore a layout ignores reports on a shard of
    another layout.

    Args:
        shards: the shards, in order.
        node_of: returns the node that holds a key; None if the node is not known.
    """

    __slots__ = ("_away_until", "_heard_at", "_node_of", "_sums", "shards")

    def __init__(self, shards: Sequence[Pool], node_of: Callable[[str], object] = str) -> None:
        self.shards = tuple(shards)
        self._node_of = node_of
        self._sums: list[tuple[int, int] | None] = [None] * len(shards)
        self._heard_at = [0.0] * len(shards)
        self._away_until = [0.0] * len(shards)

    @property
    def is_divided(self) -> bool:
        """Whether the pool has several shards."""
        return len(self.shards) > 1

    def home(self, instance_id: str) -> Pool:
        """Return the shard in which an instance lies."""
        return self.shards[crc32(instance_id.encode()) % len(self.shards)]

    def hear(self, shard: Pool, load: int, cap: int) -> None:
        """Remember the load and the capacity that a reply of a shard reported."""
        if self._has(shard):
            self._sums[shard.shard] = (load, cap)
            self._heard_at[shard.shard] = time.monotonic()
            self._away_until[shard.shard] = 0.0

    def released(self, shard: Pool) -> None:
        """Subtract one from the remembered load of a shard, because this process has released a lease."""
        heard = self._sums[shard.shard] if self._has(shard) else None
        if heard is not None:
            self._sums[shard.shard] = (heard[0] - 1, heard[1])

    def full(self, shard: Pool) -> None:
        """Remember that a shard had no free instance."""
        self.hear(shard, 1, 1)

    def lose(self, shard: Pool) -> None:
        """Mark a shard, and all other shards on its node, as unreachable for a while."""
        if self._has(shard):
            until = time.monotonic() + _AWAY_S
            node = self._node_of(shard.keys.state)
            for each in self.shards:
                if self._node_of(each.keys.state) == node:
                    self._away_until[each.shard] = until

    def is_away(self, shard: Pool) -> bool:
        """Return whether a shard is marked as unreachable."""
        return self._away_until[shard.shard] > time.monotonic()

    def _has(self, shard: Pool) -> bool:
        return shard.shards == len(self.shards)

    def free_share(self, shard: Pool) -> float:
        """Return the free share of a shard's capacity, as last reported.

        Returns 1.0 if there was no report within `_HEARD_S`, and -1.0 while the shard is marked as unreachable.
        """
        number, now = shard.shard, time.monotonic()
        heard = self._sums[number]
        if self._away_until[number] > now:
            return -1.0
        if heard is None or now - self._heard_at[number] > _HEARD_S:
            return 1.0
        return 0.0 if heard[1] <= 0 else max(0.0, 1.0 - heard[0] / heard[1])

    def in_order(self, affinity: str | None = None) -> Iterator[Pool]:
        """Yield the shards in the order in which a call tries them.

        With an affinity, the first shard is the shard to which the affinity is mapped. Without an affinity, two random
        shards are compared, and the shard with the larger free share is the first. This keeps the loads of all shards
        about equal, even if the last reports are a little old. The other shards follow, those with the largest free
        share first.
        """
        shards = self.shards
        if len(shards) == 1:
            yield shards[0]
            return
        if affinity is not None:
            first = shards[crc32(affinity.encode()) % len(shards)]
        else:
            number = random_numbers.bits(52)
            at = number % len(shards)
            first, other = shards[at], shards[(at + 1 + number // len(shards) % (len(shards) - 1)) % len(shards)]
            if self.free_share(other) > self.free_share(first):
                first = other
        yield first
        yield from sorted((each for each in shards if each is not first), key=self.free_share, reverse=True)

    def split(self, count: int) -> Iterator[tuple[Pool, int]]:
        """Divide leases over shards in proportion to their free shares. Yields each shard with its number of leases.

        Each shard costs a request, so few shards are used: those with the largest free shares. To keep the loads of the
        shards about equal, enough shards are used, if possible, that a shard gets on average at most a sixteenth of the
        mean capacity of a shard. The capacities are as last reported.
        """
        heard = [sums[1] for sums in self._sums if sums is not None and sums[1] > 1]
        part = max(1, sum(heard) // len(heard) // _PARTS) if heard else _PARTS
        if count <= part:
            yield next(self.in_order()), count
            return
        ordered = sorted(self.in_order(), key=self.free_share, reverse=True)[: -(-count // part)]
        weights = [max(self.free_share(each), 0.001) for each in ordered]
        left, total = count, sum(weights)
        for shard, weight in zip(ordered, weights, strict=True):
            if left <= 0:
                return
            number = min(left, max(1, round(left * weight / total)))
            total = max(total - weight, 0.001)
            left -= number
            yield shard, number


class Layouts:
    """The layouts of a backend's pools, as this process knows them. `layouts_of` returns this object for a backend."""

    def __init__(self, backend: Backend) -> None:
        self._namespace = backend.namespace
        self._node_of = backend.node_of
        self._known: dict[str, Layout] = {}

    def of(self, pool: Pool) -> Layout:
        """Return the known layout of a whole pool: one shard, until this process learns another number of shards.

        Args:
            pool: any shard of the pool.
        """
        found = self._known.get(pool.agent_type)
        if found is None:
            if pool.shards > 1:
                return self.learn(pool.agent_type, pool.shards)
            found = self._remember(pool.agent_type, Layout([pool]))
        return found

    def whole(self, shard: Pool) -> Pool:
        """Return the `Pool` with one shard, which stands for the whole pool of this shard."""
        return shard if shard.shards == 1 else Pool.of(self._namespace, shard.agent_type)

    def learn(self, agent_type: str, shards: int) -> Layout:
        """Remember the number of shards of a pool."""
        known = self._known.get(agent_type)
        if known is not None and len(known.shards) == shards:
            return known
        found = [Pool.of(self._namespace, agent_type, number, shards) for number in range(shards)]
        return self._remember(agent_type, Layout(found, self._node_of))

    def _remember(self, agent_type: str, layout: Layout) -> Layout:
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[agent_type] = layout
        return layout


def over_shards(
    layouts: Layouts,
    pool: Pool,
    flow: Callable[[Layout], Flow[T]],
    is_nothing: Callable[[T], bool] = lambda result: result is None,
    *,
    plain: bool = False,
) -> Flow[T]:
    """Run a flow over the shards of a pool. If this process assumed a wrong number of shards, run the flow again.

    Args:
        layouts: the layouts of this process.
        pool: the whole pool, as a `Pool` with one shard.
        flow: returns the flow for a layout.
        is_nothing: whether a result says that the flow has found nothing. In a pool with several shards, the cause may
            be that the number of shards has changed. So this number is then read from the server.
        plain: whether the flow uses only plain commands, no scripts. The server never refuses plain commands, even if
            the pool has several shards. So the number of shards is read whenever the flow finds nothing.
    """
    for left in reversed(range(_CHANGES)):
        layout = layouts.of(pool)
        try:
            result = yield from flow(layout)
        except PoolIsDivided as divided:
            if not left:
                raise
            layouts.learn(pool.agent_type, divided.shards)
            continue
        if left and (layout.is_divided or plain) and is_nothing(result):
            try:
                shards = yield from commands.count_shards(pool)
            except BackendUnavailable:  # the number of shards cannot be read: keep the result
                break
            if shards and shards != len(layout.shards):
                layouts.learn(pool.agent_type, shards)
                continue
        break
    return result


def layouts_of(backend: Backend) -> Layouts:
    """Return the `Layouts` object of this process for a backend."""
    return backend.share("lb-layouts", lambda: Layouts(backend))
