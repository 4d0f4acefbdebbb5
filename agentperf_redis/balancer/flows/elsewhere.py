"""How a waiter of a pool with several shards finds free capacity in other shards than its own.

A waiter has a ticket in the queue of one shard. Its process watches the other shards. When a script frees an instance
of a watched shard, and no waiter in the queue of that shard gets the instance, the script publishes a message. The
message wakes one waiter in each process that listens. This waiter requests a lease in that shard, and leaves its own
queue when it gets the lease. If it gets none, its process watches the shard again. A lease may also expire in a shard
that no process uses. Therefore a process looks at each shard about once per second, so a lost message only causes a
delay.

A message does not say which labels the free instance has. So a waiter that requires labels watches no shards. Instead,
it looks at the other shards more often.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from agentperf_redis import random_numbers
from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Pool, PoolIsDivided
from agentperf_redis.balancer.flows.queue import Queues
from agentperf_redis.balancer.layouts import Layout
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable

_WATCH_MS = 3000
"""Time after which the server forgets that a shard is watched, ms. A process renews a watch about once per second."""
_COUNT_S = 2.0
"""How often a waiter reads the number of shards, s. The number changes rarely, and only by hand."""
_LOOK_S, _LABELS_LOOK_S = 1.0, 0.25
"""Seconds until a process looks at the same shard again: normally, and for a waiter that requires labels."""
_ROUNDS = 3
"""Max attempts of one look to lease free capacity. An attempt fails if others have taken the capacity first."""


class Elsewhere:
    """All shards of a pool except the shard in whose queue a waiter has its ticket.

    Args:
        queues: the waiters of this process.
        whole: the whole pool, as a `Pool` with one shard.
        layout: the shards of the pool.
        own: the shard of the ticket.
        token: the token of the waiter.
        require: labels; the instance must have all of them.
        take: leases a unit of a shard without waiting; returns None if no unit is free.

    Attributes:
        poll_s: max seconds between two calls of `look`.
    """

    def __init__(
        self,
        queues: Queues,
        whole: Pool,
        layout: Layout,
        own: Pool,
        token: str,
        require: frozenset[str],
        take: Callable[[Pool], Flow[Lease | None]],
    ) -> None:
        self._queues = queues
        self._whole = whole
        self._layout = layout
        self._others = [shard for shard in layout.shards if shard is not own]
        self._token = token
        self._require = require
        self._take = take
        self.poll_s = _LABELS_LOOK_S if require else _LOOK_S
        self._count_at = time.monotonic() + _COUNT_S

    def __enter__(self) -> Self:
        if not self._require:
            self._queues.join_elsewhere(self._others, self._token)
        return self

    def __exit__(self, *_: object) -> None:
        self._queues.leave_elsewhere(self._token)

    def look(self) -> Flow[Lease | None]:
        """If another shard has free capacity, lease a unit there. Otherwise, watch the other shards.

        Raises:
            PoolIsDivided: when the number of shards has changed, so that the waiter's queue is no longer used.
        """
        if time.monotonic() >= self._count_at:
            self._count_at = time.monotonic() + _COUNT_S
            yield from self._check_count()
        for _ in range(_ROUNDS):
            free = yield from self._free()
            while (freed := self._queues.take_freed(self._token)) is not None:
                free.append(freed)
            left = list(dict.fromkeys(free))
            while left:
                lease = yield from self._take(left[0])
                if lease is not None:
                    for shard in left:  # the next waiter tries these shards, which may still have free capacity
                        self._queues.freed(shard)
                    return lease
                self._queues.watched_until.pop(left.pop(0), None)
            if not free:
                break
        return None

    def _check_count(self) -> Flow[None]:
        try:
            shards = yield from commands.count_shards(self._whole)
        except BackendUnavailable:
            return
        if shards and shards != len(self._layout.shards):
            raise PoolIsDivided(self._whole.agent_type, shards)

    def _free(self) -> Flow[list[Pool]]:
        """Look at the shards that this process does not watch. Return those with free capacity, and watch the rest."""
        now = time.monotonic()
        watched = self._queues.watched_until
        asked = [
            shard
            for shard in self._others
            if (self._require or watched.get(shard, 0.0) <= now) and not self._layout.is_away(shard)
        ]
        if not asked:
            return []
        if not self._require:
            until = now + _LOOK_S * (0.8 + 0.2 * random_numbers.fraction())
            for shard in asked:  # done before the request: a message may end the watch during the request
                watched[shard] = until
        live_ms = 0 if self._require else _WATCH_MS
        batch = Batch(tuple(commands.watch(shard, self._require, live_ms) for shard in asked))
        answers = yield from batch.settled()
        free = []
        for shard, answer in zip(asked, answers, strict=True):
            if isinstance(answer, AgentPerfError):
                self._layout.lose(shard)
            elif answer:
                watched.pop(shard, None)
                free.append(shard)
        return free
