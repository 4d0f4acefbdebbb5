"""The shards of each pool, as this process knows them, and the share of their capacity that is free.

A pool with several shards may use several nodes of a Cluster. Each instance lies in one shard. The number of shards is
stored under the keys of the pool of one shard. A process that does not know it uses these keys, and learns the number
from the refusal. If the pool has one shard, as most do, this costs nothing.

A flow for a whole pool takes its pool of one shard, and runs over its layout:

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

T = TypeVar("T")

_HEARD_S = 1.0
"""After this time, what a shard reported counts no more, s.

Otherwise a shard that was once full would never be picked first again, and so would never report free capacity.
"""
_AWAY_S = 3.0
"""For this time after a shard could not be reached, the other shards are tried first."""
_PARTS = 16
_CHANGES = 3
"""How often one operation follows a change of the number of shards. The number rarely changes, and by hand."""


class Layout:
    """The shards of a pool, and what this process last heard from each of them. Methods take no lock.

    Reports on a shard of another layout, such as that of a lease from before the number of shards changed, are ignored.

    Args:
        shards: the shards, in order.
        node_of: returns the node that holds a key, as far as it is known.
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
        """Count a lease of a shard that this process has released."""
        heard = self._sums[shard.shard] if self._has(shard) else None
        if heard is not None:
            self._sums[shard.shard] = (heard[0] - 1, heard[1])

    def full(self, shard: Pool) -> None:
        """Remember that a shard had no free instance."""
        self.hear(shard, 1, 1)

    def lose(self, shard: Pool) -> None:
        """Remember that a shard could not be reached, and so neither the other shards on its node."""
        if self._has(shard):
            until = time.monotonic() + _AWAY_S
            node = self._node_of(shard.keys.state)
            for each in self.shards:
                if self._node_of(each.keys.state) == node:
                    self._away_until[each.shard] = until

    def is_away(self, shard: Pool) -> bool:
        """Return whether a shard could not be reached a moment ago."""
        return self._away_until[shard.shard] > time.monotonic()

    def _has(self, shard: Pool) -> bool:
        return shard.shards == len(self.shards)

    def free_share(self, shard: Pool) -> float:
        """Return the share of the capacity of a shard that is free, as last heard.

        Returns 1.0 if the shard has reported nothing lately, and -1.0 for a while after it could not be reached.
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

        The first is the shard of the affinity, or the better of two random shards: the one with the larger free share.
        Two random choices keep the load of the shards about equal, even if what this process heard is a little old. The
        other shards follow by their free share.
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
        """Divide a number of leases over shards, in proportion to what is free. Yields shards with their numbers.

        Each shard is a request, so as few shards are used as keep their load about equal: no shard gets more than a
        sixteenth of its capacity, as last heard. The shards with the largest free share come first.
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
    """The layouts of the pools of a backend in this process. `layouts_of` returns the object of a backend."""

    def __init__(self, backend: Backend) -> None:
        self._namespace = backend.namespace
        self._node_of = backend.node_of
        self._known: dict[str, Layout] = {}

    def of(self, pool: Pool) -> Layout:
        """Return the layout of a whole pool, as this process knows it: one shard, unless it has learned another number.

        Args:
            pool: any shard of the pool.
        """
        found = self._known.get(pool.agent_type)
        if found is None:
            if pool.shards > 1:
                return self.learn(pool.agent_type, pool.shards)
            found = self._known[pool.agent_type] = Layout([pool])
        return found

    def whole(self, shard: Pool) -> Pool:
        """Return the pool of one shard, which stands for the whole pool."""
        return shard if shard.shards == 1 else Pool.of(self._namespace, shard.agent_type)

    def learn(self, agent_type: str, shards: int) -> Layout:
        """Remember the number of shards of a pool."""
        known = self._known.get(agent_type)
        if known is not None and len(known.shards) == shards:
            return known
        found = [Pool.of(self._namespace, agent_type, number, shards) for number in range(shards)]
        layout = Layout(found, self._node_of)
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
    """Run a flow over the shards of a pool. If the pool has another number of shards, run it again over these.

    Args:
        layouts: the layouts of this process.
        pool: the pool of one shard.
        flow: makes the flow.
        is_nothing: whether a result says that the flow has found nothing. If it finds nothing in a pool of several
            shards, this may be because the number of shards has changed, so it is read from the server.
        plain: whether the flow has only plain commands. A pool with several shards does not refuse them, so the number
            of shards is read whenever the flow finds nothing.
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
            shards = yield from commands.count_shards(pool)
            if shards and shards != len(layout.shards):
                layouts.learn(pool.agent_type, shards)
                continue
        break
    return result


def layouts_of(backend: Backend) -> Layouts:
    """Return the layouts of this process for a backend."""
    return backend.share("lb-layouts", lambda: Layouts(backend))
