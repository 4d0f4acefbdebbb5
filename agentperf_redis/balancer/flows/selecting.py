"""The flow that returns the instance which `acquire` would pick."""

from __future__ import annotations

from agentperf_redis.balancer import commands
from agentperf_redis.balancer.commands import Choice, Pool
from agentperf_redis.balancer.layouts import Layout, Layouts, over_shards
from agentperf_redis.balancer.model import AgentInstance
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable


def select(layouts: Layouts, pool: Pool, choice: Choice) -> Flow[AgentInstance | None]:
    """Return the instance that `acquire` would pick now, without leasing it."""

    def select_in(layout: Layout) -> Flow[AgentInstance | None]:
        away: BackendUnavailable | None = None
        for shard in layout.in_order(choice.affinity):
            if away is not None and layout.is_away(shard):
                continue
            try:
                found = yield from commands.select(shard, choice)
            except BackendUnavailable as error:
                layout.lose(shard)
                away = error
            else:
                if found is not None:
                    return found
        if away is not None:
            raise away
        return None

    return (yield from over_shards(layouts, pool, select_in))
