"""Restored registrations of a pool with several shards, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.balancer import AgentInstance, LoadBalancingStrategy
from agentperf_redis.balancer.commands import LAYOUT, REGISTER, Division, Pool, Rates, RegisterReply
from agentperf_redis.balancer.registrations import Registered, Registrations
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable

AWAY = BackendUnavailable("redis://node", "not_applied", "no answer")
STRATEGY = LoadBalancingStrategy.LEAST_LOADED


class Parts:
    """The backend, clock and thread that the registrations need."""

    namespace = "n"
    node_of = str

    def share(self, _: str, make: Any) -> Any:
        return make()

    def on_new_epoch(self, _: Any) -> None:
        pass

    def at(self, *_: object) -> None:
        pass

    def enter(self, *_: object, **__: object) -> Flow[None]:
        yield from ()

    def before_deadline(self, _: Pool, request: Any) -> Flow[Any]:
        return (yield from request(0))


def test_other_shards_are_restored_first() -> None:
    parts: Any = Parts()
    registrations = Registrations(parts, parts, parts, float)
    layout = registrations.layouts.learn("coder", 3)
    for number in range(30):
        registrations.remember(
            Registered(AgentInstance(f"p{number}", "coder"), STRATEGY, 0, Rates(), None, born=number)
        )
    first, second, _ = layout.shards
    kept = {each.keys.state for each in layout.shards if each is not second}
    lost = {name for _, name in registrations.registered if layout.home(name) is second}
    registered = set()

    flow = registrations.restore(Pool.of("n", "coder"))
    step: Any = next(flow)
    with pytest.raises(BackendUnavailable):  # noqa: PT012  the error ends the flow
        while True:
            if step.script is LAYOUT:
                step = flow.send(Division(3, STRATEGY))
            elif step.script is REGISTER:
                registered.add(step.args["id"])
                step = flow.send(RegisterReply(STRATEGY, 1, ""))
            elif step.keys == (first.keys.state,):
                step = flow.throw(AWAY)
            else:
                names = step.args[1:]
                step = flow.send((99, [step.keys[0] in kept] * len(names)))
    assert registered == lost
    assert lost
