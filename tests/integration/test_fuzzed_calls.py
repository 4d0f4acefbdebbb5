"""Every public call with hostile arguments returns, or raises a documented error. A refused call sends nothing.

`python -m tests.fuzzing` makes many more calls, of new seeds.
"""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest

import agentperf_redis
from agentperf_redis.alerts.async_client import AsyncAlerts
from agentperf_redis.alerts.client import Alerts
from agentperf_redis.balancer.async_client import AsyncLoadBalancer
from agentperf_redis.locks.async_client import AsyncLock, AsyncSemaphore
from agentperf_redis.metrics.async_client import AsyncMetricsCollector
from tests.fuzzing import replies
from tests.fuzzing.calls import NOT_CALLED, Fuzzer, World, packed, public
from tests.support.examples import examples
from tests.support.servers import Server

pytestmark = pytest.mark.servers("valkey")

PUBLIC: dict[str, Any] = {
    **{name: getattr(agentperf_redis, name) for name in agentperf_redis.__all__},
    **{
        each.__name__: each
        for each in (Alerts, AsyncAlerts, AsyncLoadBalancer, AsyncLock, AsyncSemaphore, AsyncMetricsCollector)
    },
}


@pytest.mark.filterwarnings("ignore")  # for example, warnings about values that cannot be stored
@examples(60, 1200)
def test_hostile_arguments_cause_only_documented_errors(own_server: Server, namespace: str, examples: int) -> None:
    with own_server.client() as raw, packed() as counts:
        world = World(own_server.url, namespace)
        fuzzer = Fuzzer(world, counts)
        try:
            fuzzer.run(examples)
            assert list(fuzzer.complaints.values()) == []
            world.read_everything()
        finally:
            fuzzer.close()
            world.close()
        assert {"returned", "InvalidArgument"} <= fuzzer.ends.keys()
        received = raw.info("commandstats")
    counted = fuzzer.sent.copy()
    for (_, name), count in counts.items():
        counted[name] += count
    for name in ("EVALSHA", "EVAL"):
        assert received[f"cmdstat_{name.lower()}"]["calls"] <= counted[name], "a command was sent past the counter"


def test_every_public_callable_is_fuzzed(server: Server, namespace: str) -> None:
    world = World(server.url, namespace)
    world.close()
    called = {target.name for target in world.targets}
    missing = []
    for name, each in PUBLIC.items():
        if inspect.isclass(each):
            names = [] if issubclass(each, BaseException) else [f"{name}.{method}" for method in public(each)]
        else:
            names = [name]
        missing += [name for name in names if name not in called and name not in NOT_CALLED]
    assert missing == []
    assert [name for name in NOT_CALLED if name in called] == []
    for target in world.targets:
        assert target.arguments is not None, "a parameter without values raises an error"


@examples(2000, 60_000)
def test_changed_replies_cause_only_documented_errors(server: Server, namespace: str, examples: int) -> None:
    with replies.recorded() as records:
        world = World(server.url, namespace)
        world.read_everything()
        world.close()
    assert len({replies.name_of(command) for command, _ in records}) > 20
    assert replies.complaints(records, random.Random(1), examples) == {}
