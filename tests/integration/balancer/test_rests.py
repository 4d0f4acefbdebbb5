"""An instance that answered 429 rests: no process leases it until the rest is over."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import redis

from agentperf_redis import AgentInstance, AgentPerf, NoCapacity, PoolSettings, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import EventKind, InstanceState, LoadBalancer, Outcome, commands
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.errors import InvalidArgument
from tests.support.calls import Call
from tests.support.servers import Raw, Server
from tests.support.workers import Workers

LASTING = 600.0
"""Seconds of a rest that does not end during a test, however slow the machine is."""


@pytest.fixture
def lb(backend: Backend) -> LoadBalancer:
    return LoadBalancer(backend=backend)


def register(lb: LoadBalancer, *names: str, **facts: Any) -> None:
    for name in names:
        lb.register_instance(AgentInstance(name, "planner", **facts))


def state_of(lb: LoadBalancer, name: str) -> InstanceState:
    return next(each.state for pool in lb.status("planner") for each in pool.instances if each.instance.id == name)


def kinds(lb: LoadBalancer, name: str) -> list[EventKind]:
    return [each.kind for each in lb.events("planner") if each.instance_id == name]


def end_rest(raw: Raw, namespace: str, name: str) -> None:
    """Make the timer of a rest due now."""
    pool = keys.pool(namespace, "planner")
    assert raw.zadd(pool.due, {"C:" + name: 1}, xx=True, ch=True) == 1
    raw.hset(pool.state, "#next", 1)


def test_rate_limited_instance_is_left_out_until_its_rest_ends(
    lb: LoadBalancer, call: Call, raw: Raw, namespace: str
) -> None:
    register(lb, "a", "b")
    first = call(lb, "acquire", "planner")
    assert call(lb, "release", first, outcome="rate_limited", retry_after=LASTING, response_time=0.001)
    held = [call(lb, "acquire", "planner") for _ in range(10)]
    assert {each.id for each in held} == {"a", "b"} - {first.id}
    assert call(lb, "acquire", "planner") is None
    (pool,) = lb.status("planner")
    status = next(each for each in pool.instances if each.instance.id == first.id)
    assert status.state is InstanceState.RESTING
    assert LASTING - 60 < status.resting_for <= LASTING
    assert (status.failed, status.failed_in_a_row, status.served) == (1, 0, 0)
    assert status.instance.is_healthy
    assert status.instance.response_time_ms == 0
    end_rest(raw, namespace, first.id)
    again = call(lb, "acquire", "planner")
    assert again.id == first.id
    assert kinds(lb, first.id) == [EventKind.REGISTERED, EventKind.RESTING, EventKind.RESTED]
    assert lb.events("planner")[2].details == {"for_ms": "600000", "why": "rate_limited"}
    for each in (*held, again):
        call(lb, "release", each)


def test_no_capacity_names_the_end_of_the_first_rest(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a", "b", "c")
    for name, seconds in (("a", 900.0), ("b", 300.0), ("c", 600.0)):
        assert call(lb, "cool_down", "planner", name, seconds) is True
    for wait in (0.0, 0.01):
        with pytest.raises(NoCapacity) as refused, call.inside(lb, "lease", "planner", wait=wait):
            pass
        assert 240 < refused.value.retry_after <= 300
        assert "3 resting or rate-limited" in refused.value.reason


@pytest.mark.parametrize("panic", [False, True])
def test_retry_after_is_known_although_resting_instances_are_down(
    lb: LoadBalancer, backend: Backend, panic: bool
) -> None:
    register(lb, "a", "b", "c")
    down = ["a", "b"] if panic else ["a"]
    pool = Pool.of(backend.namespace, "planner")
    backend.run(commands.report_checks(pool, 1, [(name, False) for name in down]))
    for claimed in (2, 3):
        backend.run(commands.report_checks(pool, claimed, [(name, False) for name in down]))
    assert (lb.status("planner")[0].panic_for is not None) is panic
    for name in ("a", "b", "c"):
        lb.cool_down("planner", name, LASTING)
    assert lb.acquire("planner") is None
    with pytest.raises(NoCapacity) as refused, lb.lease("planner"):
        pass
    if panic:
        assert LASTING - 60 < refused.value.retry_after <= LASTING


def test_a_later_end_wins_and_an_earlier_one_changes_nothing(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a", max_capacity=3)
    held = [call(lb, "acquire", "planner") for _ in range(3)]
    for each, seconds in zip(held, (300.0, 900.0, 1.0), strict=True):
        call(lb, "release", each, outcome=Outcome.RATE_LIMITED, retry_after=seconds)
    ((status,),) = (pool.instances for pool in lb.status("planner"))
    assert 800 < status.resting_for <= 900
    assert status.failed == 3
    assert kinds(lb, "a").count(EventKind.RESTING) == 1


def test_rest_before_a_removal_does_not_prolong_a_later_one(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a")
    held = call(lb, "acquire", "planner")
    call(lb, "cool_down", "planner", "a", 900.0)
    call(lb, "remove_instance", "planner", "a")
    register(lb, "a")  # a held lease has kept the record of the removed instance
    assert state_of(lb, "a") is InstanceState.UP
    found = lb._backend.run(commands.claim_checks(Pool.of(lb._backend.namespace, "planner"), 1000, 10))
    assert [each.id for each in found.instances] == ["a"]
    call(lb, "cool_down", "planner", "a", 300.0)
    ((status,),) = (pool.instances for pool in lb.status("planner"))
    assert 0 < status.resting_for <= 300
    call(lb, "release", held)


def test_waiter_gets_the_instance_when_its_rest_ends(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a")
    call(lb, "cool_down", "planner", "a", 0.3)
    began = time.monotonic()
    instance = call(lb, "acquire", "planner", wait=60)
    assert instance.id == "a"
    assert 0.25 < time.monotonic() - began < 30
    call(lb, "release", instance)


def test_rest_without_a_named_time_lasts_five_seconds(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a")
    call(lb, "release", call(lb, "acquire", "planner"), outcome="rate_limited")
    (event,) = (each for each in lb.events("planner") if each.kind is EventKind.RESTING)
    assert event.details["for_ms"] == "5000"


def test_retry_after_zero_lets_nothing_rest(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a")
    call(lb, "release", call(lb, "acquire", "planner"), outcome="rate_limited", retry_after=0)
    assert state_of(lb, "a") is InstanceState.UP
    held = call(lb, "acquire", "planner")
    call(lb, "cool_down", "planner", "a", LASTING)
    call(lb, "release", held, outcome="rate_limited", retry_after=0)
    assert state_of(lb, "a") is InstanceState.RESTING


def test_lease_block_reports_the_rate_limit(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a")
    with call.inside(lb, "lease", "planner") as lease:
        lease.outcome, lease.retry_after = "rate_limited", LASTING
    assert state_of(lb, "a") is InstanceState.RESTING
    with pytest.raises(InvalidArgument, match="retry_after"):
        lease.retry_after = -1


@pytest.mark.parametrize("known", [True, False], ids=["known to be lost", "not known to be lost"])
def test_lost_lease_still_reports_the_rate_limit(lb: LoadBalancer, call: Call, known: bool) -> None:
    register(lb, "a", "b")
    instance = call(lb, "acquire", "planner")
    assert lb.release_token("planner", instance.lease.token)
    if known:
        instance.lease.lose("the test says so")
    assert call(lb, "release", instance, outcome="rate_limited", retry_after=LASTING) is False
    assert state_of(lb, instance.id) is InstanceState.RESTING


def test_rate_limits_neither_eject_nor_end_a_series_of_errors(backend: Backend) -> None:
    lb = LoadBalancer(settings=PoolSettings(eject_after=3, adaptive=True), backend=backend)
    register(lb, "a", "b")
    errors = 0
    while EventKind.EJECTED not in kinds(lb, "a"):
        instance = lb.acquire("planner", require=())
        assert instance is not None
        if instance.id == "b":
            lb.release(instance, outcome="neutral")
            continue
        for _ in range(5):
            lb.release(lb.acquire("planner"), outcome="rate_limited", retry_after=0)
        lb.release(instance, outcome="error")
        errors += 1
    assert errors == 3
    assert EventKind.EJECTED not in kinds(lb, "b")


def test_mark_healthy_ends_a_rest(lb: LoadBalancer, call: Call, raw: Raw, namespace: str) -> None:
    register(lb, "a")
    call(lb, "cool_down", "planner", "a", LASTING)
    assert call(lb, "mark_healthy", "planner", "a")
    assert state_of(lb, "a") is InstanceState.UP
    assert raw.zscore(keys.pool(namespace, "planner").due, "C:a") is None
    call(lb, "cool_down", "planner", "a", 1)  # the old rest has been removed, so it cannot prolong the new rest
    ((status,),) = (pool.instances for pool in lb.status("planner"))
    assert status.resting_for <= 1


def test_resting_instance_gets_no_active_checks(lb: LoadBalancer, backend: Backend) -> None:
    register(lb, "a", "b")
    lb.cool_down("planner", "a", LASTING)
    claimed = backend.run(commands.claim_checks(Pool.of(backend.namespace, "planner"), 1000, 100))
    assert [each.id for each in claimed.instances] == ["b"]


def test_repair_restores_the_timer_of_a_rest(lb: LoadBalancer, raw: Raw, namespace: str) -> None:
    register(lb, "a")
    lb.cool_down("planner", "a", LASTING)
    due = keys.pool(namespace, "planner").due
    before = raw.zscore(due, "C:a")
    raw.zrem(due, "C:a")
    lb.repair("planner")
    assert raw.zscore(due, "C:a") == before


def test_unknown_instance_cannot_be_cooled_down(lb: LoadBalancer, call: Call) -> None:
    register(lb, "a")
    assert call(lb, "cool_down", "planner", "other", 5) is False
    assert call(lb, "cool_down", "nothing", "other", 5) is False


@pytest.mark.parametrize(
    ("argument", "method", "args", "options"),
    [
        ("seconds", "cool_down", ("planner", "a", 0), {}),
        ("seconds", "cool_down", ("planner", "a", 86_401), {}),
        ("seconds", "cool_down", ("planner", "a", "5"), {}),
        ("instance_id", "cool_down", ("planner", "", 5), {}),
        ("agent_type", "cool_down", (None, "a", 5), {}),
        ("retry_after", "release", (), {"outcome": "rate_limited", "retry_after": -1}),
        ("retry_after", "release", (), {"outcome": "error", "retry_after": 5}),
        ("retry_after", "release", (), {"retry_after": 5}),
    ],
)
def test_invalid_rest_is_refused(
    lb: LoadBalancer, call: Call, argument: str, method: str, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    register(lb, "a")
    held = lb.acquire("planner")
    with pytest.raises(InvalidArgument) as refused:
        call(lb, method, *(args or (held,)), **options)
    assert refused.value.argument == argument
    assert lb.release(held)


# A test under load: while a rate-limited instance rests, no process leases it.

PROCESSES, REST_S, RUN_S = 4, 2.0, 8.0
LIMITED = "limited"
"""The key in which the simulated service `p2` stores the end of its limit. The end is a `time.monotonic`, a clock that
all processes of a machine share."""


def use(url: str, namespace: str, number: int) -> dict[str, Any]:
    """Call the services as fast as possible. After a third of the time, the service p2 begins to answer 429."""
    calls: list[tuple[str, float, float]] = []
    refusals: list[tuple[float, float]] = []
    outer = threading.Lock()

    def work(perf: AgentPerf, service: redis.Redis, until: float, begins: float) -> None:
        lb = perf.balancer()
        while (sent := time.monotonic()) < until:
            instance = lb.acquire("planner", wait=1)
            granted = time.monotonic()
            if instance is None:
                continue
            outcome, left = "ok", 0.0
            if instance.id == "p2":
                if granted > begins:
                    service.set(f"{namespace}.{LIMITED}", str(granted + REST_S), nx=True)
                left = float(service.get(f"{namespace}.{LIMITED}") or 0) - time.monotonic()
                outcome = "rate_limited" if left > 0 else "ok"
            replied = time.monotonic()
            lb.release(instance, outcome=outcome, retry_after=left if outcome == "rate_limited" else None)
            with outer:
                calls.append((instance.id, sent, granted))
                if outcome == "rate_limited":
                    refusals.append((replied + left, time.monotonic()))

    with AgentPerf(url, namespace=namespace) as perf, redis.Redis.from_url(url) as service:
        until = time.monotonic() + RUN_S
        begins = until - RUN_S * 2 / 3
        threads = [threading.Thread(target=work, args=(perf, service, until, begins)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {"calls": calls, "refusals": refusals, "number": number}


@pytest.mark.thorough
@pytest.mark.standalone
def test_no_process_calls_a_rate_limited_instance_before_its_time(
    server: Server, lb: LoadBalancer, namespace: str, workers: Workers
) -> None:
    names = [f"p{number}" for number in range(5)]
    register(lb, *names, max_capacity=2)
    found = workers.run(use, [(server.url, namespace, number) for number in range(PROCESSES)])
    calls = [call for each in found for call in each["calls"]]
    refusals = [refusal for each in found for refusal in each["refusals"]]
    assert refusals, "p2 was not called after its limit began"
    begin = min(known for _, known in refusals)  # from this time on, the server knows that p2 rests
    end = min(until for until, _ in refusals)
    late = [(sent, granted) for name, sent, granted in calls if name == "p2" and sent > begin and granted < end - 0.01]
    assert late == []
    assert len(refusals) <= 2, "more refusals than calls that were granted before"
    during = [name for name, sent, granted in calls if begin < sent and granted < end]
    assert set(during) == set(names) - {"p2"}
    assert len(during) > 50
    after = [granted for name, _, granted in calls if name == "p2" and granted >= end]
    assert after, "p2 is not back"
    assert lb.status("planner")[0].current_load == 0
    assert state_of(lb, "p2") is InstanceState.UP
