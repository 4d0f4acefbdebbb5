"""The methods of a balancer refuse bad arguments in both APIs, before they send anything."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis import LRUCache, MetricsCollector, PoolSettings, TieredCache
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from tests.support.refusals import assert_refused


@pytest.fixture
def balancer(dead_backend: Backend) -> LoadBalancer:
    return LoadBalancer(backend=dead_backend)


PLANNER = AgentInstance("p0", "planner")
# One bad value per argument. The tests of the argument checks cover the other bad values.
REFUSED: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    *[("agent_type", method, ("",), {}) for method in ("acquire", "select_instance", "lease", "leases", "repair")],
    ("agent_types", "status", ("",), {}),
    ("agent_type", "events", ("",), {}),
    ("agent_type", "configure", ("", PoolSettings()), {}),
    ("settings", "configure", ("planner", None), {}),
    ("after", "events", ("planner",), {"after": "yesterday"}),
    ("limit", "events", ("planner",), {"limit": 0}),
    *[
        (argument, method, args, {})
        for method in ("remove_instance", "mark_healthy", "mark_unhealthy", "drain", "undrain", "update_instance")
        for argument, args in (("agent_type", ("", "p0")), ("instance_id", ("planner", "")))
    ],
    ("max_capacity", "update_instance", ("planner", "p0"), {"max_capacity": 0}),
    ("weight", "update_instance", ("planner", "p0"), {"weight": -1}),
    ("labels", "update_instance", ("planner", "p0"), {"labels": "gpu"}),
    ("requests_per_minute", "update_instance", ("planner", "p0"), {"requests_per_minute": 0}),
    ("tokens_per_minute", "update_instance", ("planner", "p0"), {"tokens_per_minute": 0}),
    *[
        (argument, method, ("planner",), {argument: value})
        for method in ("acquire", "lease")
        for argument, value in (
            ("wait", -1),
            ("priority", 1.5),
            ("ttl", 0),
            ("max_hold", 0),
            ("on_lost", 5),
            ("tokens", -1),
            ("fallback", "writer"),
        )
    ],
    *[
        (argument, method, ("planner",), {argument: value})
        for method in ("acquire", "lease", "select_instance")
        for argument, value in (("require", "gpu"), ("affinity", 5))
    ],
    ("instance", "register_instance", ("p0",), {}),
    ("heartbeat_ttl", "register_instance", (PLANNER,), {"heartbeat_ttl": 0}),
    ("requests_per_minute", "register_instance", (PLANNER,), {"requests_per_minute": "60"}),
    ("tokens_per_minute", "register_instance", (PLANNER,), {"tokens_per_minute": True}),
    ("agent_type", "heartbeat", ("", "p0"), {}),
    ("instance_ids", "heartbeat", ("planner", ""), {}),
    ("within", "heartbeat", ("planner", "p0"), {"within": 0}),
    ("instance", "release", ("p0",), {}),
    ("instance", "release", (PLANNER,), {}),  # this instance carries no lease
    ("agent_type", "release_token", ("", "@host:1:a"), {}),
    ("token", "release_token", ("planner", ""), {}),
    ("token", "release_token", ("planner", "no-at"), {}),
    ("progress", "repair", ("planner",), {"progress": 5}),
    ("wait", "wait_until_idle", ("planner", "p0"), {"wait": None}),
    ("agent_type", "wait_until_idle", ("", "p0"), {"wait": 1}),
    ("instance_id", "wait_until_idle", ("planner", ""), {"wait": 1}),
]


@pytest.mark.parametrize(
    ("argument", "method", "args", "kwargs"), REFUSED, ids=lambda part: part if isinstance(part, str) else ""
)
def test_bad_argument_is_refused_by_its_name(
    balancer: LoadBalancer, argument: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert_refused(balancer, argument, method, *args, **kwargs)


@pytest.mark.parametrize("value", ["fastest", "ROUND_ROBIN", 1, object()])
def test_unknown_strategy_is_refused_with_the_known_ones(balancer: LoadBalancer, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="round_robin"):
        LoadBalancer(value, backend=balancer._backend)


def test_unreachable_server_is_named_in_the_error(balancer: LoadBalancer) -> None:
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1"):
        balancer.acquire("planner")


def test_releasing_nothing_needs_no_server(balancer: LoadBalancer) -> None:
    assert balancer.release(None) is False


@pytest.mark.parametrize("client", [LoadBalancer, LRUCache, TieredCache, MetricsCollector])
@pytest.mark.parametrize("backend", ["redis://localhost", object()])
def test_client_refuses_an_object_that_is_no_backend(client: Any, backend: object) -> None:
    with pytest.raises(InvalidArgument) as refused:
        client(backend=backend)
    assert (refused.value.argument, refused.value.value) == ("backend", backend)
    assert "a Backend, such as perf.backend" in str(refused.value)
