"""Leases and instances on a real server, through both APIs."""

from __future__ import annotations

import itertools
import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import (
    AgentInstance,
    LoadBalancer,
    LoadBalancingStrategy,
    Outcome,
    PoolSettings,
    commands,
)
from agentperf_redis.errors import CorruptState, InvalidArgument, LeaseLost, NoCapacity, SchemaMismatch
from tests.support import records
from tests.support.calls import Call
from tests.support.servers import Raw, wait_until
from tests.support.stalls import StallDetector

STRATEGIES = list(LoadBalancingStrategy)


@pytest.fixture(autouse=True)
def kept() -> Iterator[list[AgentInstance]]:
    """A list that keeps leases until the backend is closed. A dropped lease would be released with a warning."""
    _kept.clear()
    yield _kept
    _kept.clear()


_kept: list[AgentInstance] = []


def acquire(call: Call, balancer: LoadBalancer, *args: Any, **kwargs: Any) -> Any:
    instance = call(balancer, "acquire", *args, **kwargs)
    if instance is not None:
        _kept.append(instance)
    return instance


@pytest.fixture
def balancer(backend: Backend) -> LoadBalancer:
    return LoadBalancer(backend=backend)


def register(call: Call, balancer: LoadBalancer, count: int, **facts: Any) -> None:
    for number in range(count):
        call(balancer, "register_instance", AgentInstance(f"p{number}", "planner", **facts))


def leases(raw: Raw, pool: keys.PoolKeys) -> list[str]:
    """Return the tokens of leases and of unfetched grants. Both hold capacity."""
    return records.held(raw.hgetall(pool.state))


def load_of(raw: Raw, pool: keys.PoolKeys, name: str) -> int:
    return int(records.number(raw.hget(pool.state, name), "load"))


@pytest.fixture
def pool(namespace: str) -> keys.PoolKeys:
    return keys.pool(namespace, "planner")


# The in-memory version's behaviour


def test_demo_of_the_in_memory_version_runs(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(LoadBalancingStrategy.LEAST_LOADED, backend=backend)
    for i in range(3):
        call(balancer, "register_instance", AgentInstance(id=f"p{i}", agent_type="ml-engineer", max_capacity=5))
    active = [acquire(call, balancer, "ml-engineer") for _ in range(10)]
    assert [f"{each.id} {each.current_load}/{each.max_capacity}" for each in active] == [
        f"p{i % 3} {i // 3 + 1}/5" for i in range(10)
    ]
    for instance in active[:5]:
        assert call(balancer, "release", instance) is True
    status = call(balancer, "get_status")
    assert status == {
        "ml-engineer": {
            "instances": 3,
            "healthy": 3,
            "total_capacity": 15,
            "current_load": 5,
            "load_percentage": "33.3%",
            "instances_detail": [
                {"id": "p0", "load": "2/5", "load_pct": "40.0%", "healthy": True},
                {"id": "p1", "load": "1/5", "load_pct": "20.0%", "healthy": True},
                {"id": "p2", "load": "2/5", "load_pct": "40.0%", "healthy": True},
            ],
        }
    }


def test_agent_type_without_instances_returns_none(
    call: Call, balancer: LoadBalancer, raw: Raw, namespace: str
) -> None:
    assert acquire(call, balancer, "planner") is None
    assert call(balancer, "select_instance", "planner") is None
    assert call(balancer, "get_status") == {}
    assert not [key for key in raw.scan_iter(f"{namespace}:*") if "{" in key]


def test_instances_show_their_registered_fields(call: Call, balancer: LoadBalancer) -> None:
    given = AgentInstance("p {1}", "plan ner", 0, 7, 2.5, True, 12.5, labels=frozenset({"gpu", "-", "a,b"}))
    call(balancer, "register_instance", given)
    assert balancer.instances == {"plan ner": [given]}
    assert acquire(call, balancer, "plan ner").id == "p {1}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_fills_only_healthy_instances(call: Call, backend: Backend, strategy: Any) -> None:
    balancer = LoadBalancer(strategy, backend=backend)
    register(call, balancer, 3, max_capacity=2)
    assert call(balancer, "mark_unhealthy", "planner", "p1")
    granted = [acquire(call, balancer, "planner") for _ in range(4)]
    assert Counter(each.id for each in granted) == {"p0": 2, "p2": 2}
    assert acquire(call, balancer, "planner") is None
    assert call(balancer, "select_instance", "planner") is None
    assert call(balancer, "mark_healthy", "planner", "p1")
    assert call(balancer, "select_instance", "planner").id == "p1"
    for instance in granted:
        assert call(balancer, "release", instance)


def test_round_robin_picks_instances_in_turn(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer("round_robin", backend=backend)
    register(call, balancer, 3)
    assert [acquire(call, balancer, "planner").id for _ in range(7)] == ["p0", "p1", "p2", "p0", "p1", "p2", "p0"]


def test_weight_zero_is_picked_only_when_all_are_zero(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer("weighted", backend=backend)
    register(call, balancer, 2, weight=0.0)
    assert acquire(call, balancer, "planner") is not None
    call(balancer, "register_instance", AgentInstance("heavy", "planner", max_capacity=20, weight=0.001))
    assert {acquire(call, balancer, "planner").id for _ in range(19)} == {"heavy"}


def test_consistent_hash_keeps_affinity_on_its_instance(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer("consistent_hash", backend=backend)
    register(call, balancer, 5, max_capacity=100)
    for session in ("alice", "bob", "carol"):
        first = acquire(call, balancer, "planner", affinity=session)
        call(balancer, "release", first)
        assert call(balancer, "select_instance", "planner", affinity=session).id == first.id


def test_required_labels_limit_the_instances(call: Call, balancer: LoadBalancer) -> None:
    for name, labels in (("a", {"gpu"}), ("b", {"gpu", "fr"}), ("c", {"fr"}), ("d", set())):
        call(balancer, "register_instance", AgentInstance(name, "planner", max_capacity=1, labels=frozenset(labels)))
    assert acquire(call, balancer, "planner", require={"gpu", "fr"}).id == "b"
    assert acquire(call, balancer, "planner", require={"gpu", "fr"}) is None
    assert acquire(call, balancer, "planner", require={"fr"}).id == "c"
    assert acquire(call, balancer, "planner", require={"gpu"}).id == "a"
    assert acquire(call, balancer, "planner", require={"fr"}) is None
    assert call(balancer, "update_instance", "planner", "d", labels={"fr"})
    assert acquire(call, balancer, "planner", require={"fr"}).id == "d"


@pytest.mark.parametrize("label", ["-gpu", "gpu-", "-", "--"])
def test_label_may_begin_and_end_with_dash(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, label: str
) -> None:
    call(balancer, "register_instance", AgentInstance("p0", "planner", labels=frozenset({label})))
    assert acquire(call, balancer, "planner", require={label}).labels == {label}
    assert call(balancer, "update_instance", "planner", "p0", labels=())
    assert acquire(call, balancer, "planner", require={label}) is None
    assert call(balancer, "update_instance", "planner", "p0", labels={label, "fr"})
    assert acquire(call, balancer, "planner", require={label}).labels == {label, "fr"}
    assert call(balancer, "update_instance", "planner", "p0", labels={label})
    assert acquire(call, balancer, "planner", require={label}).labels == {label}
    assert call(balancer, "remove_instance", "planner", "p0")
    assert [key for key in raw.scan_iter(f"{pool.ready.partition('{')[0]}*") if "@" in key] == []


def test_acquire_clears_all_expired_leases_before_refusing(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> None:
    for name, capacity in (("a", 200), ("b", 1)):
        instance = AgentInstance(name, "planner", max_capacity=capacity, labels=frozenset({name}))
        call(balancer, "register_instance", instance)
    held = [acquire(call, balancer, "planner", require={"a"}, ttl=600.0) for _ in range(150)]
    last = acquire(call, balancer, "planner", require={"b"}, ttl=600.0)
    raw.zadd(pool.due, {each.lease.token: 1.0 for each in held})
    raw.zadd(pool.due, {last.lease.token: 2.0})
    raw.hset(pool.state, "#next", "1")
    assert acquire(call, balancer, "planner", require={"b"}).id == "b"


# Instances


def test_registering_again_keeps_load_and_health(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> None:
    register(call, balancer, 1, max_capacity=2)
    held = acquire(call, balancer, "planner")
    call(balancer, "mark_unhealthy", "planner", "p0")
    register(call, balancer, 1, max_capacity=4, weight=3.0)
    (status,) = call(balancer, "status", "planner")
    (instance,) = (each.instance for each in status.instances)
    assert (instance.current_load, instance.max_capacity, instance.weight, instance.is_healthy) == (1, 4, 3.0, False)
    assert call(balancer, "release", held)
    assert raw.zcard(pool.ready) == 0


def test_smaller_capacity_lets_leases_end_normally(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1, max_capacity=3)
    held = [acquire(call, balancer, "planner") for _ in range(3)]
    assert call(balancer, "update_instance", "planner", "p0", max_capacity=1)
    for instance in held[:2]:
        assert call(balancer, "release", instance)
    assert acquire(call, balancer, "planner") is None
    assert call(balancer, "release", held[2])
    assert acquire(call, balancer, "planner") is not None


def test_draining_instance_finishes_its_leases(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    held = acquire(call, balancer, "planner")
    assert call(balancer, "drain", "planner", "p0")
    assert acquire(call, balancer, "planner") is None
    assert call(balancer, "release", held) is True
    (status,) = call(balancer, "status")
    assert status.instances[0].instance.is_draining
    assert status.instances[0].instance.is_healthy
    assert call(balancer, "undrain", "planner", "p0")
    assert acquire(call, balancer, "planner") is not None


def test_removed_instance_is_deleted_with_its_last_lease(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> None:
    register(call, balancer, 2, max_capacity=1)
    held = [acquire(call, balancer, "planner") for _ in range(2)]
    assert call(balancer, "remove_instance", "planner", "p0") is True
    assert call(balancer, "remove_instance", "planner", "p0") is False
    assert [each["id"] for each in call(balancer, "get_status")["planner"]["instances_detail"]] == ["p1"]
    assert raw.hexists(pool.state, "p0")
    for instance in held:
        assert call(balancer, "release", instance) is True
    assert not raw.hexists(pool.state, "p0")
    assert raw.hget(pool.state, "#load") == "0"
    assert [acquire(call, balancer, "planner").id, acquire(call, balancer, "planner")] == ["p1", None]


def test_calls_report_an_unknown_instance(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    for method in ("mark_healthy", "mark_unhealthy", "drain", "undrain", "remove_instance"):
        assert call(balancer, method, "planner", "unknown") is False
    assert call(balancer, "update_instance", "planner", "unknown", weight=2) is False
    assert call(balancer, "heartbeat", "planner", "p0", "no body") == ["no body"]


def test_instance_without_heartbeat_takes_no_work(call: Call, balancer: LoadBalancer) -> None:
    call(balancer, "register_instance", AgentInstance("p0", "planner"), heartbeat_ttl=0.05)
    wait_until(lambda: not call(balancer, "select_instance", "planner"), "the heartbeat to be missed")
    assert call(balancer, "get_status")["planner"]["healthy"] == 0
    assert call(balancer, "heartbeat", "planner", "p0", within=60) == []
    assert acquire(call, balancer, "planner").id == "p0"


def test_status_lists_instances_in_registration_order(
    call: Call, balancer: LoadBalancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentperf_redis.balancer.flows.instances.STATUS_PAGE", 7)
    names = [f"p{number}" for number in range(20)]
    for name in names:
        call(balancer, "register_instance", AgentInstance(name, "planner", max_capacity=1))
    (status,) = call(balancer, "status")
    assert [each.instance.id for each in status.instances] == names
    assert (status.total_capacity, status.current_load, status.granted, status.waiting) == (20, 0, 0, 0)


# Strategy


def test_other_strategy_is_refused_with_instructions(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys
) -> None:
    first = LoadBalancer("round_robin", backend=backend)
    register(call, first, 1)
    before = raw.hgetall(pool.state)
    other = LoadBalancer("random", backend=backend)
    for method, args in (
        ("register_instance", (AgentInstance("p1", "planner"),)),
        ("acquire", ("planner",)),
        ("select_instance", ("planner",)),
    ):
        with pytest.raises(InvalidArgument, match=r"'round_robin'.*remove all its instances") as caught:
            call(other, method, *args)
        assert (caught.value.argument, caught.value.value) == ("strategy", "random")
    assert raw.hgetall(pool.state) == before
    any_ = LoadBalancer(backend=backend)
    assert acquire(call, any_, "planner").id == "p0"
    call(any_, "remove_instance", "planner", "p0")
    register(call, other, 1)
    assert call(other, "status", "planner")[0].strategy is LoadBalancingStrategy.RANDOM


# Leases


def test_release_returns_whether_it_freed_a_unit(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> None:
    register(call, balancer, 1)
    instance = acquire(call, balancer, "planner")
    assert instance.lease is not None
    assert instance.lease.held
    assert raw.hget(pool.state, instance.lease.token) == f"lease instance=p0 fence={instance.lease.fence} ttl_ms=30000"
    assert call(balancer, "release", instance) is True
    assert call(balancer, "release", instance) is False
    assert call(balancer, "release", instance.lease) is False
    assert load_of(raw, pool, "p0") == 0
    assert leases(raw, pool) == []


def test_selected_instance_cannot_be_released(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    selected = call(balancer, "select_instance", "planner")
    assert selected.current_load == 0
    with pytest.raises(InvalidArgument, match="carries its lease"):
        call(balancer, "release", selected)


def test_releasing_none_returns_false(call: Call, balancer: LoadBalancer) -> None:
    assert call(balancer, "release", acquire(call, balancer, "planner")) is False


def test_lease_of_another_namespace_cannot_be_released(
    call: Call, balancer: LoadBalancer, connect: Callable[..., Backend], server: Any, namespace: str
) -> None:
    register(call, balancer, 1)
    held = acquire(call, balancer, "planner")
    other = LoadBalancer(backend=connect(server.url, namespace=namespace[:-1]))
    with pytest.raises(InvalidArgument, match="namespace"):
        call(other, "release", held)
    assert call(balancer, "release", held)


def test_fencing_tokens_rise_per_instance(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1, max_capacity=100)
    fences = [acquire(call, balancer, "planner").lease.fence for _ in range(20)]
    assert fences == sorted(set(fences))


def test_block_reports_response_time_and_outcome(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    with call.inside(balancer, "lease", "planner") as lease:
        assert lease.instance.id == "p0"
        assert lease.instance.lease is lease
    for error in (ValueError, TimeoutError):
        with pytest.raises(error), call.inside(balancer, "lease", "planner"):
            raise error
    with pytest.raises(KeyboardInterrupt), call.inside(balancer, "lease", "planner"):
        raise KeyboardInterrupt
    with call.inside(balancer, "lease", "planner") as lease:
        lease.outcome = Outcome.REJECTED
    (status,) = call(balancer, "status")
    seen = status.instances[0]
    assert (seen.served, seen.failed, seen.failed_in_a_row, seen.instance.current_load) == (1, 3, 3, 0)
    assert 0 < seen.instance.response_time_ms < 5000


def test_response_times_are_a_moving_average(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    for seconds, expected in ((0.1, 100), (0.2, 120), (0.12, 120)):
        call(balancer, "release", acquire(call, balancer, "planner"), response_time=seconds)
        (status,) = call(balancer, "status")
        assert status.instances[0].instance.response_time_ms == pytest.approx(expected)


def test_block_on_a_full_pool_raises_no_capacity(call: Call, balancer: LoadBalancer) -> None:
    with (
        pytest.raises(NoCapacity, match="no instance of 'planner' is registered"),
        call.inside(balancer, "lease", "planner"),
    ):
        raise AssertionError
    register(call, balancer, 1, max_capacity=1)
    held = acquire(call, balancer, "planner", ttl=8.0)
    with pytest.raises(NoCapacity) as caught, call.inside(balancer, "lease", "planner"):
        raise AssertionError
    assert caught.value.agent_type == "planner"
    assert 0 < caught.value.retry_after <= 8.0
    assert call(balancer, "release", held)


def test_release_of_an_expired_lease_frees_nothing(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> None:
    register(call, balancer, 1, max_capacity=1)
    held = acquire(call, balancer, "planner", ttl=0.05)
    balancer._operations.keeper.drop(held.lease)  # the lease is no longer renewed, as if this process were paused
    wait_until(lambda: acquire(call, balancer, "planner"), "the lease to expire")
    assert _kept[-1].lease is not None
    assert _kept[-1].lease.fence > held.lease.fence
    assert call(balancer, "release", held) is False
    assert load_of(raw, pool, "p0") == 1
    assert raw.hget(pool.state, held.lease.token) == "tombstone why=expired"


def test_snapshot_errors_name_the_method_to_use(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    instance = acquire(call, balancer, "planner")
    with pytest.raises(FrozenInstanceError, match="mark_unhealthy"):
        instance.is_healthy = False
    with pytest.raises(FrozenInstanceError, match="update_instance"):
        instance.max_capacity = 3


# Foreign data


@pytest.mark.parametrize("strategy", LoadBalancingStrategy)
def test_instances_of_wrong_type_are_found_before_a_grant(
    call: Call, backend: Backend, raw: Raw, pool: keys.PoolKeys, strategy: LoadBalancingStrategy
) -> None:
    balancer = LoadBalancer(strategy, backend=backend)
    register(call, balancer, 2)
    for ready in raw.keys(f"{pool.tag}:ready*"):
        raw.delete(ready)
        raw.set(ready, "poison")
    before = raw.hgetall(pool.state), raw.zrange(pool.due, 0, -1, withscores=True)
    with pytest.raises(CorruptState, match="ready"):
        call(balancer, "acquire", "planner", affinity="x")
    assert (raw.hgetall(pool.state), raw.zrange(pool.due, 0, -1, withscores=True)) == before


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("part", ["state", "ready", "due", "waitq", "ids", "ring", "away", "checks", "events"])
def test_key_of_wrong_type_is_named_and_unchanged(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, part: str
) -> None:
    register(call, balancer, 2)
    # With this TTL, no lease becomes due for renewal during the test, so only the call under test can change keys.
    held = acquire(call, balancer, "planner", ttl=3600)
    poisoned = f"{pool.tag}:{part}"
    raw.delete(poisoned)
    raw.set(poisoned, "poison")
    names = [key for name, key in pool._asdict().items() if name != "tag"]

    def everything() -> dict[str, Any]:
        return {key: raw.dump(key) if key == poisoned else repr(read(key)) for key in names}

    def read(key: str) -> Any:
        match raw.type(key):
            case "none":
                return None
            case "zset":
                return raw.zrange(key, 0, -1, withscores=True)
            case "hash":
                return raw.hgetall(key)
            case _:
                return raw.xrange(key)

    before = everything()
    attempts: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("acquire", ("planner",), {"ttl": 3600}),
        ("select_instance", ("planner",), {}),
        ("release", (held,), {}),
        ("register_instance", (AgentInstance("p9", "planner"),), {}),
        ("update_instance", ("planner", "p0"), {}),
        ("remove_instance", ("planner", "p0"), {}),
        ("heartbeat", ("planner", "p0"), {}),
        ("get_status", (), {}),
        ("leases", ("planner",), {}),
        ("repair", ("planner",), {}),
        ("configure", ("planner", PoolSettings(eject_after=3)), {}),
        ("wait_until_idle", ("planner", "p0"), {}),
    ]
    failed, named = 0, set()
    for method, args, options in attempts:
        try:
            _kept.append(
                call(balancer, method, *args, **options)
            )  # keep a reference: a dropped lease would be released in the background
        except CorruptState as error:
            failed += 1
            named.add(error.key)
            assert everything() == before
        before = everything()
    assert set(raw.scan_iter(f"{pool.tag}:*", count=10_000)) <= set(names), "nothing was written elsewhere"
    # If the scripts compute the name of the key, the error cannot name the key and names `state` instead.
    assert named == {poisoned if poisoned in pool.all else pool.state}
    assert failed >= (1 if part in ("ring", "checks") else 2)


_RECORD = "load=0 limit=5 seq=0 fence=0 peak=0 ewma_us=0 ewma_at_ms=0 served=0 failed=0 streak=0 weight=1 labels=- flags=- cap=5"


@pytest.mark.parametrize(
    "strategy", ["least_loaded", "peak_ewma", "consistent_hash"]
)  # the script parses the record differently for each of these strategies
@pytest.mark.parametrize(
    "record",
    [
        *("poison", "load=1 limit=2 seq=3", "", "9" * 400, "0 5 0 0 0 1 - - 5 0 0 0 0 0"),
        *(_RECORD.replace("weight=1", "weight=heavy"), _RECORD.replace("cap=5", "cap=x"), _RECORD.partition(" cap")[0]),
        *(
            _RECORD.replace("failed=0", "failed=x"),
            _RECORD.replace("load=0", "load=-1"),
            _RECORD.replace("fence=0 ", ""),
        ),
    ],
)
def test_foreign_record_is_named_in_the_error(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, record: str, strategy: str
) -> None:
    balancer = LoadBalancer(strategy, backend=balancer._backend)
    register(call, balancer, 1)
    raw.hset(pool.state, "p0", record)
    for method, args in (("acquire", ("planner",)), ("select_instance", ("planner",)), ("get_status", ())):
        with pytest.raises(CorruptState, match="state"):
            call(balancer, method, *args)
    assert raw.hget(pool.state, "p0") == record
    assert leases(raw, pool) == []


LEADING_ZEROS = ("007", "-05", "-0")  # HINCRBY fails on a field with such a number


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product(["#next", "#picks", "#load", "#cap"], ["many", "1.5", "9" * 40, ""]),
        *itertools.product(["#picks", "#load", "#cap"], LEADING_ZEROS),
    ],
)
def test_foreign_counter_is_named_and_nothing_written(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, field: str, value: str
) -> None:
    register(call, balancer, 1, max_capacity=3)
    held = [acquire(call, balancer, "planner", ttl=600.0) for _ in range(2)]
    raw.zadd(pool.due, {held[1].lease.token: 1.0})  # the lease has expired, so the next call must end it
    if value in LEADING_ZEROS:
        # With `#next` at 0, acquire runs maintenance. Without maintenance, acquire would need no HINCRBY, so acquire
        # could accept the number.
        raw.hset(pool.state, "#next", 0)
    raw.hset(pool.state, field, value)
    before = (raw.hgetall(pool.state), raw.zrange(pool.due, 0, -1, withscores=True))
    for method, args in (
        ("acquire", ("planner",)),
        ("select_instance", ("planner",)),
        ("register_instance", (AgentInstance("p9", "planner"),)),
        ("update_instance", ("planner", "p0")),
        ("remove_instance", ("planner", "p0")),
        ("heartbeat", ("planner", "p0")),
        ("get_status", ()),
    ):
        with pytest.raises(CorruptState, match=field):
            call(balancer, method, *args)
    with pytest.raises(CorruptState, match=field):
        balancer._backend.run(commands.release(commands.Pool("planner", pool), held[0].lease.token, tombstone_ms=1000))
    assert (raw.hgetall(pool.state), raw.zrange(pool.due, 0, -1, withscores=True)) == before

    call(balancer, "repair", "planner")
    assert call(balancer, "release", held[0]) is True
    assert call(balancer, "get_status")["planner"]["current_load"] == 0
    assert raw.hmget(pool.state, "#load", "#cap") == ["0", "3"]


@pytest.mark.parametrize(("fact", "found"), [("schema=3 strategy=least_loaded", "3"), ("1 least_loaded", "1")])
def test_other_schema_is_refused_and_unchanged(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys, fact: str, found: str
) -> None:
    register(call, balancer, 1)
    held = acquire(call, balancer, "planner")
    raw.hset(pool.state, "#pool", fact)
    before = raw.hgetall(pool.state)
    for method, args in (
        ("acquire", ("planner",)),
        ("select_instance", ("planner",)),
        ("release", (held,)),
        ("register_instance", (AgentInstance("p9", "planner"),)),
        ("update_instance", ("planner", "p0")),
        ("remove_instance", ("planner", "p0")),
        ("heartbeat", ("planner", "p0")),
        ("get_status", ()),
        ("leases", ("planner",)),
        ("repair", ("planner",)),
        ("configure", ("planner", PoolSettings(eject_after=3))),
        ("wait_until_idle", ("planner", "p0")),
    ):
        with pytest.raises(SchemaMismatch, match=rf"\b{found}\b"):
            call(balancer, method, *args)
    assert raw.hgetall(pool.state) == before


def test_error_names_a_pool_without_registrations(call: Call, balancer: LoadBalancer) -> None:
    with (
        pytest.raises(NoCapacity, match="no instance of 'typo' is registered"),
        call.inside(balancer, "lease", "typo"),
    ):
        pass


@pytest.mark.thorough
def test_lease_lost_inside_a_block_is_raised(call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys) -> None:
    register(call, balancer, 1)
    losses: list[LeaseLost] = []
    with (  # noqa: PT012
        pytest.raises(LeaseLost) as caught,
        call.inside(balancer, "lease", "planner", ttl=4.0, on_lost=losses.append) as lease,
    ):
        raw.zrem(pool.due, lease.token)
        wait_until(lambda: losses, "the keeper to notice the loss")
        with pytest.raises(LeaseLost):
            lease.check()
        assert lease.remaining == 0.0
    assert caught.value.token == losses[0].token == lease.token
    assert caught.value.pool == "planner"
    assert caught.value.reason == "another caller released it, or it expired before it was renewed"


@pytest.mark.thorough
def test_leases_are_renewed_until_max_hold(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1, max_capacity=1)
    lost_at: list[float] = []
    ttl, maximum = 2.0, 2.5
    with StallDetector() as stalls:
        begin = time.monotonic()
        held = call(
            *(balancer, "acquire", "planner"),
            ttl=ttl,
            max_hold=maximum,
            on_lost=lambda _: lost_at.append(time.monotonic()),
        )
        wait_until(lambda: acquire(call, balancer, "planner") is not None, "its capacity to become free")
        assert time.monotonic() - begin >= maximum, "longer than the lease may be held"
        wait_until(lambda: lost_at, "the loss at max_hold to be reported")
        assert lost_at[0] - begin >= maximum
        assert stalls.own(begin, lost_at[0]) < maximum + 2.5
    assert "max_hold" in str(held.lease.lost)
    assert call(balancer, "release", held) is False


def test_max_hold_may_be_infinite(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    assert call(balancer, "release", acquire(call, balancer, "planner", max_hold=math.inf))


def test_heartbeat_lasts_for_its_registered_ttl_by_default(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> None:
    def due_in() -> list[float]:
        now_s, rest_us = raw.time()
        return [(raw.zscore(pool.due, f"H:p{n}") - now_s * 1000 - rest_us / 1000) / 1000 for n in range(3)]

    def beat(**how: float) -> None:
        assert call(balancer, "heartbeat", "planner", "p0", "p1", "p2", **how) == []

    for number, ttl in enumerate((5, None, 2000)):
        call(balancer, "register_instance", AgentInstance(f"p{number}", "planner"), heartbeat_ttl=ttl)
    for _ in range(2):  # the first heartbeat and a later one
        beat()
        assert due_in() == pytest.approx([5, 30, 2000], abs=2)
    beat(within=100)
    assert due_in() == pytest.approx([100, 100, 100], abs=2)
    call(balancer, "update_instance", "planner", "p0", max_capacity=3)
    call(balancer, "register_instance", AgentInstance("p2", "planner"))
    beat()
    assert due_in() == pytest.approx([5, 30, 30], abs=2)
    raw.zadd(pool.due, {"H:p0": 1})
    assert not next(
        each for each in call(balancer, "status")[0].instances if each.instance.id == "p0"
    ).instance.is_healthy
    beat()
    assert due_in() == pytest.approx([5, 30, 30], abs=2)
    assert call(balancer, "status")[0].healthy == 3


def test_overdue_counts_leases_but_no_tombstones(
    call: Call, balancer: LoadBalancer, raw: Raw, pool: keys.PoolKeys
) -> None:
    register(call, balancer, 1, max_capacity=300)
    raw.zadd(pool.due, {f"X@old:{number}": number + 1 for number in range(1000)})
    assert call(balancer, "status")[0].overdue == 0
    raw.zadd(pool.due, {f"@lost:{number}": 2000 + number for number in range(100)})
    assert raw.zcard(pool.due) > 1000
    assert call(balancer, "status")[0].overdue == 100


def test_refusal_explains_why_no_instance_is_available(call: Call, balancer: LoadBalancer) -> None:
    def refusal(**request: Any) -> NoCapacity:
        with pytest.raises(NoCapacity) as refused, call.inside(balancer, "lease", "planner", **request):
            pass
        copy: NoCapacity = pickle.loads(pickle.dumps(refused.value))
        assert (str(copy), copy.none_exists) == (str(refused.value), refused.value.none_exists)
        return copy

    def why(**request: Any) -> str:
        return refusal(**request).reason

    assert why() == "no instance of 'planner' is registered"
    for number in range(4):
        labels = frozenset({"gpu"} if number < 2 else ())
        instance = AgentInstance(f"p{number}", "planner", max_capacity=1, labels=labels)
        call(balancer, "register_instance", instance, requests_per_minute=1 if number == 3 else math.inf)
    assert why(require=("tpu", "gpu")) == "no instance of 'planner' has the labels 'gpu', 'tpu'"
    assert str(refusal(require=("tpu",))) == "no instance of 'planner' has the label 'tpu'"
    assert refusal(require=("tpu",)).none_exists
    assert not refusal(require=("tpu",), fallback=("critic",)).none_exists
    call(balancer, "drain", "planner", "p0")
    assert acquire(call, balancer, "planner", require=("gpu",)).id == "p1"
    assert not refusal(require=("gpu",)).none_exists
    assert "; try again in " in str(refusal(require=("gpu",)))
    assert why(require=("gpu",)) == "of 2 instances with the label 'gpu', 1 draining, 1 full"
    held = {each.id: each for each in (acquire(call, balancer, "planner") for _ in range(2))}
    assert call(balancer, "release", held["p3"]) is True  # p3 is no longer full, but its rate limit is used up
    assert (
        why()
        == "of 4 instances, 2 full, 1 resting or rate-limited, 1 out of rotation (draining, marked unhealthy or heartbeat missed)"
    )
    call(balancer, "mark_unhealthy", "planner", "p2")
    assert why(wait=0.01).startswith("of 4 instances, 1 full, 1 resting or rate-limited, 2 out of rotation")


def test_lease_ended_by_operator_is_an_event(call: Call, balancer: LoadBalancer) -> None:
    register(call, balancer, 1)
    held = acquire(call, balancer, "planner")
    assert held.lease is not None
    assert call(balancer, "release_token", "planner", held.lease.token) is True
    last = call(balancer, "events", "planner")[-1]
    assert (last.kind.value, last.instance_id, last.details) == ("released", "p0", {"lease": held.lease.token})
    (status,) = call(balancer, "status")[0].instances
    assert (status.instance.current_load, status.served, status.failed) == (0, 0, 0)
    assert call(balancer, "release", held) is False


@pytest.mark.parametrize("strategy", LoadBalancingStrategy)
def test_weight_of_minus_zero_is_zero(backend: Backend, strategy: LoadBalancingStrategy) -> None:
    balancer = LoadBalancer(strategy, backend=backend)
    balancer.register_instance(AgentInstance("p1", "planner", weight=-0.0))
    balancer.update_instance("planner", "p1", weight=-0.0)
    instance = balancer.acquire("planner")
    assert instance is not None
    assert balancer.release(instance) is True
