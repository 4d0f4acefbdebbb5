"""What the balancer refuses before anything is sent. The backend's address has no server: a command would fail otherwise."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis import LRUCache, MetricsCollector, PoolSettings, TieredCache
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer
from agentperf_redis.errors import BackendUnavailable, InvalidArgument

NO_NAMES: list[Any] = ["", "a\x00b", "a\r\nb", "\x7f", "\ud800", "x" * 201, 5, None, b"planner", ["planner"], True]
NO_SECONDS: list[Any] = [math.nan, -math.inf, 0, -1, 1e-9, 1e300, True, "5", None, []]
NO_COUNTS: list[Any] = [0, -1, 2**31, 2**53 + 1, 2**63, 2**64, True, 1.5, "3", None, math.nan]
NO_WEIGHTS: list[Any] = [-1, -0.001, math.nan, math.inf, 1e7, 2**4000, True, "1", None]
NO_LABELS: list[Any] = ["gpu", b"gpu", 5, [""], ["a\nb"], [None], {1: 2}, [f"l{n}" for n in range(17)]]


@pytest.fixture
def balancer() -> Iterator[LoadBalancer]:
    backend = Backend("redis://127.0.0.1:1/0", deadline=0.05)
    yield LoadBalancer(backend=backend)
    backend.close()


def cases() -> Iterator[Any]:
    for value in NO_NAMES:
        for method in ("acquire", "select_instance", "lease", "status", "leases", "repair"):
            yield pytest.param(method, (value,), {}, "agent_type", id=f"{method}-type-{str(value)[:5]!r}")
        for method in ("remove_instance", "mark_healthy", "mark_unhealthy", "drain", "undrain", "update_instance"):
            yield pytest.param(method, ("planner", value), {}, "instance_id", id=f"{method}-id-{str(value)[:5]!r}")
            yield pytest.param(method, (value, "p0"), {}, "agent_type", id=f"{method}-type-{str(value)[:5]!r}")
        yield pytest.param("heartbeat", ("planner", value), {}, "instance_ids", id=f"heartbeat-{str(value)[:5]!r}")
    for value in (math.nan, -1, -0.001, 1e300, True, "5", None):
        for method in ("acquire", "lease"):
            yield pytest.param(method, ("planner",), {"wait": value}, "wait", id=f"{method}-wait-{value!r}")
        yield pytest.param("wait_until_idle", ("a", "b"), {"wait": value}, "wait", id=f"idle-wait-{value!r}")
    for value in (1.5, True, "1", None, 10**7, math.inf):
        for method in ("acquire", "lease"):
            yield pytest.param(method, ("planner",), {"priority": value}, "priority", id=f"{method}-prio-{value!r}")
    for value in (*NO_NAMES, "no-at"):
        yield pytest.param("release_token", ("planner", value), {}, "token", id=f"token-{str(value)[:5]!r}")
    yield pytest.param("repair", ("planner",), {"progress": 5}, "progress", id="progress")
    for value in NO_SECONDS:
        for method in ("acquire", "lease"):
            for argument in ("ttl", "max_hold"):
                yield pytest.param(
                    method, ("planner",), {argument: value}, argument, id=f"{method}-{argument}-{value!r}"
                )
        if value is not None:
            yield pytest.param("heartbeat", ("planner", "p"), {"within": value}, "within", id=f"within-{value!r}")
            instance = AgentInstance("p", "planner")
            yield pytest.param(
                "register_instance", (instance,), {"heartbeat_ttl": value}, "heartbeat_ttl", id=f"beat-{value!r}"
            )
    for value in NO_COUNTS:
        if value is not None:
            facts = {"max_capacity": value}
            yield pytest.param("update_instance", ("a", "b"), facts, "max_capacity", id=f"update-capacity-{value!r}")
    for value in NO_WEIGHTS:
        if value is not None:
            shown = "huge" if value == 2**4000 else repr(value)
            yield pytest.param("update_instance", ("a", "b"), {"weight": value}, "weight", id=f"update-weight-{shown}")
    for number, value in enumerate(NO_LABELS):
        yield pytest.param("update_instance", ("a", "b"), {"labels": value}, "labels", id=f"update-labels-{number}")
        for method in ("acquire", "lease", "select_instance"):
            yield pytest.param(method, ("planner",), {"require": value}, "require", id=f"{method}-require-{number}")
    for value in (5, "\ud800", b"x", []):
        for method in ("acquire", "lease", "select_instance"):
            yield pytest.param(method, ("a",), {"affinity": value}, "affinity", id=f"{method}-affinity-{value!a}")
    for value in (None, "p0", 5, {"id": "p0"}):
        yield pytest.param("register_instance", (value,), {}, "instance", id=f"register-{value!r}")
    for value in ("p0", 5, {"id": "p0"}):
        yield pytest.param("release", (value,), {}, "instance", id=f"release-{value!r}")
    yield pytest.param("release", (AgentInstance("p", "planner"),), {}, "instance", id="release-peek")
    yield pytest.param("acquire", ("planner",), {"on_lost": 5}, "on_lost", id="on_lost")


@pytest.mark.parametrize("face", ["sync", "async"])
@pytest.mark.parametrize(("method", "args", "kwargs", "argument"), list(cases()))
def test_bad_input_is_refused_before_a_command_is_sent(
    balancer: LoadBalancer, face: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], argument: str
) -> None:
    async def run() -> None:
        result = getattr(balancer.aio, method)(*args, **kwargs)
        if method != "lease":
            await result

    with pytest.raises(InvalidArgument) as caught:
        asyncio.run(run()) if face == "async" else getattr(balancer, method)(*args, **kwargs)
    assert argument in caught.value.argument or caught.value.argument in argument
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("facts", "argument"),
    [
        *[({"id": value}, "id") for value in NO_NAMES],
        *[({"agent_type": value}, "agent_type") for value in NO_NAMES],
        *[({"max_capacity": value}, "max_capacity") for value in NO_COUNTS],
        *[({"weight": value}, "weight") for value in NO_WEIGHTS],
        *[({"labels": value}, "labels") for value in NO_LABELS],
        *[({"current_load": value}, "current_load") for value in (-1, True, "1", 0.5, None)],
        *[({"is_healthy": value}, "is_healthy") for value in (1, 0, "yes", None)],
        *[({"response_time_ms": value}, "response_time_ms") for value in (-1, math.nan, math.inf, "1", True)],
    ],
)
def test_an_instance_is_checked_at_birth(facts: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        AgentInstance(**{"id": "p", "agent_type": "planner", **facts})
    assert argument in caught.value.argument


@pytest.mark.parametrize("value", ["fastest", "ROUND_ROBIN", 1, object()])
def test_a_strategy_there_is_not_is_refused(balancer: LoadBalancer, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="round_robin"):
        LoadBalancer(value, backend=balancer._backend)


def test_a_server_that_is_not_there_is_named_within_the_deadline(balancer: LoadBalancer) -> None:
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1"):
        balancer.acquire("planner")


@pytest.fixture
def nowhere() -> Iterator[Backend]:
    backend = Backend("redis://127.0.0.1:1/0", deadline=0.05)
    yield backend
    backend.close()


def test_releasing_nothing_needs_no_server(nowhere: Backend) -> None:
    assert LoadBalancer(backend=nowhere).release(None) is False


def test_a_lease_block_used_otherwise_names_the_right_form(nowhere: Backend) -> None:
    balancer: Any = LoadBalancer(backend=nowhere)
    with pytest.raises(AttributeError, match=r"with lb\.lease\(.*\) as lease"):
        _ = balancer.lease("t").instance
    with pytest.raises(AttributeError, match=r"async with lb\.aio\.lease\(.*\) as lease"):
        _ = balancer.aio.lease("t").instance
    with pytest.raises(TypeError, match=r"async with lb\.aio\.lease"), balancer.aio.lease("t"):
        pass

    async def enter() -> None:
        async with balancer.lease("t"):
            pass

    with pytest.raises(TypeError, match=r"async with lb\.aio\.lease"):
        asyncio.run(enter())


def test_an_instance_speaks_of_its_own_fields() -> None:
    make: Any = AgentInstance
    with pytest.raises(TypeError, match=r"^AgentInstance\.__init__"):
        make(id="a")
    instance: Any = AgentInstance("a", "t")
    with pytest.raises(AttributeError, match="no field 'foo'"):
        instance.foo = 1


@pytest.mark.parametrize("client", [LoadBalancer, LRUCache, TieredCache, MetricsCollector])
@pytest.mark.parametrize("backend", ["redis://localhost", object()])
def test_what_is_no_backend_is_named(client: Any, backend: object) -> None:
    with pytest.raises(InvalidArgument) as refused:
        client(backend=backend)
    assert (refused.value.argument, refused.value.value) == ("backend", backend)
    assert "a Backend, such as perf.backend" in str(refused.value)


def test_a_check_takes_two_seconds_or_its_interval_unless_told(balancer: LoadBalancer) -> None:
    def limit(interval: float, timeout: float | None) -> float:
        return balancer._requests.checking("planner", print, interval, timeout).timeout

    assert [limit(0.5, None), limit(2.0, None), limit(60.0, None), limit(60.0, 30.0)] == [0.5, 2.0, 2.0, 30.0]
    with pytest.raises(InvalidArgument, match=r"^timeout is 1\.0; allowed: seconds from 0\.005 to 0\.5$"):
        limit(0.5, 1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eject_for": 400}, "eject_for is 400; allowed: seconds up to those of eject_for_most, 300"),
        ({"eject_for_most": 5}, "eject_for_most is 5; allowed: seconds from those of eject_for, 10, to 86400"),
        ({"eject_for": 40, "eject_for_most": 30}, "eject_for_most is 30; allowed: seconds from those of eject_for, 40"),
        ({"eject_for_most": 0}, "eject_for_most is 0; allowed: seconds from 0.001 to 86400"),
    ],
)
def test_an_ejection_longer_than_the_longest_names_what_was_given(given: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        PoolSettings(**given)  # type: ignore[arg-type]
    assert str(refused.value).startswith(said)
    assert PoolSettings(eject_for=400, eject_for_most=400).eject_for == 400
