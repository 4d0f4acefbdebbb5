"""Active checks: processes share the checks without a leader; the results disable and enable instances."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentInstance, PoolSettings, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import EventKind, InstanceState, LoadBalancer, commands
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.errors import InvalidArgument
from tests.support.calls import Call
from tests.support.forks import in_child
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector
from tests.support.workers import Worker, Workers

INTERVAL_S, PROCESSES, FLEET = 0.5, 4, 30
TIMEOUT_S = 0.15
STALL_S = 0.2
"""After a stall of at least this time, s, a check may be counted in the wrong interval."""


def states(balancer: LoadBalancer) -> dict[str, InstanceState]:
    (pool,) = balancer.status("planner")
    return {each.instance.id: each.state for each in pool.instances}


def check_until_killed(url: str, namespace: str, file: str, is_async: bool) -> None:
    """Check the fleet until killed. Write each check and each stall of the machine to a file that survives SIGKILL."""
    balancer = LoadBalancer(backend=Backend(url, namespace=namespace))
    seen = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write_down_stalls() -> None:
        last = time.time()
        while True:
            time.sleep(0.02)
            now = time.time()
            if now - last > STALL_S:
                os.write(seen, f"held-up {now} {os.getpid()}\n".encode())
            last = now

    threading.Thread(target=write_down_stalls, daemon=True).start()

    def note(instance: AgentInstance) -> bool:
        os.write(seen, f"{instance.id} {time.time()} {os.getpid()}\n".encode())
        return True

    if is_async:
        asyncio.run(balancer.aio.run_checks("planner", note, interval=INTERVAL_S, timeout=0.3))
    with balancer.run_checks("planner", note, interval=INTERVAL_S, timeout=0.3):
        threading.Event().wait()


@pytest.mark.thorough
def test_processes_check_each_instance_once_an_interval(
    server: Server, namespace: str, backend: Backend, raw: Raw, workers: Workers, tmp_path: Path
) -> None:
    balancer = LoadBalancer(backend=backend)
    for number in range(FLEET):
        balancer.register_instance(AgentInstance(f"p{number}", "planner"))
    file = tmp_path / "seen"

    def start(number: int) -> Worker:
        return workers.start(check_until_killed, server.url, namespace, str(file), number % 2 == 1)

    crowd = [start(number) for number in range(PROCESSES)]

    def seen() -> list[tuple[str, float, int]]:
        lines = file.read_text().splitlines() if file.exists() else []
        return [(name, float(at), int(pid)) for name, at, pid in map(str.split, lines)]

    intervals = 6
    for attempt in range(5):
        began_with = len(seen())
        wait_until(
            lambda since=began_with: len({pid for _, _, pid in seen()[since:]}) >= 3,  # type: ignore[misc]
            "the processes to share the work",
        )
        with StallDetector(raw.ping) as stalls:
            begin, begin_here = time.time(), time.monotonic()
            time.sleep(2.5 * INTERVAL_S)
            crowd[attempt % PROCESSES].kill()
            time.sleep(max(0.0, begin + intervals * INTERVAL_S - time.time()))
            end, end_here = time.time(), time.monotonic()
        in_range = [(name, at) for name, at, _ in seen() if begin <= at < begin + intervals * INTERVAL_S]
        counts = Counter(name for name, _ in in_range if name != "held-up")
        assert len(counts) == FLEET
        longest = max(
            (until - since for since, until in stalls.spans if since < end_here and until > begin_here), default=0
        )
        if longest < STALL_S and not [
            at for name, at, _ in seen() if name == "held-up" and begin <= at < end + STALL_S
        ]:
            assert all(intervals - 1 <= count <= intervals + 1 for count in counts.values()), counts
            return
        # The machine stalled, so checks may have been skipped. This attempt does not show how processes share checks.
        crowd[attempt % PROCESSES] = start(attempt)
    lost = stalls.within(begin_here, end_here)
    assert all(count <= intervals + 1 + lost / INTERVAL_S for count in counts.values()), counts


def check_until(call: Call, balancer: LoadBalancer, check: Callable[..., object], done: Callable[[], object]) -> None:
    """Run checks through the blocking or the asyncio API until a condition holds."""
    if not call.is_async:
        with balancer.run_checks("planner", check, interval=0.2, timeout=TIMEOUT_S) as checks:
            assert "running" in repr(checks)
            wait_until(done, "the results of the checks")
        assert "stopped" in repr(checks)
        return

    async def run() -> None:
        task = asyncio.create_task(balancer.aio.run_checks("planner", check, interval=0.2, timeout=TIMEOUT_S))
        try:
            await asyncio.to_thread(wait_until, done, "the results of the checks")
        finally:
            task.cancel()

    call._runner.run(run())  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["returns False", "raises", "hangs"])
def test_failed_checks_disable_instances_and_passed_ones_enable(call: Call, backend: Backend, how: str) -> None:
    balancer = LoadBalancer(settings=PoolSettings(panic_threshold=1.0), backend=backend)
    for number in range(4):
        balancer.register_instance(AgentInstance(f"p{number}", "planner"))
    failing = {"p0", "p1", "p2"}
    calls: Counter[str] = Counter()

    def plain(instance: AgentInstance) -> bool:
        calls[instance.id] += 1
        if instance.id in failing and how == "raises":
            raise ConnectionError("no route")
        if instance.id in failing and how == "hangs":
            time.sleep(2 * TIMEOUT_S)
        return not (instance.id in failing and how == "returns False")

    async def awaited(instance: AgentInstance) -> bool:
        if instance.id in failing and how == "hangs":
            await asyncio.sleep(30)
        return plain(instance)

    check = awaited if call.is_async and how == "hangs" else plain
    down = dict.fromkeys(("p0", "p1", "p2"), InstanceState.DOWN) | {"p3": InstanceState.UP}
    check_until(call, balancer, check, lambda: states(balancer) == down)
    assert calls["p3"] >= 3
    assert {balancer.acquire("planner").id for _ in range(5)} == {"p3"}  # type: ignore[union-attr]
    failing.clear()
    check_until(call, balancer, check, lambda: set(states(balancer).values()) == {InstanceState.UP})
    kinds = [each.kind for each in balancer.events("planner") if each.instance_id == "p0"]
    assert kinds == [EventKind.REGISTERED, EventKind.DOWN, EventKind.UP]


def picked(balancer: LoadBalancer, times: int) -> set[str]:
    """Acquire some leases, release them all, and return the instances picked."""
    held = [instance for _ in range(times) if (instance := balancer.acquire("planner"))]
    assert len(held) == times
    for instance in held:
        balancer.release(instance)
    return {instance.id for instance in held}


def test_failed_checks_of_most_instances_start_panic(backend: Backend) -> None:
    balancer = LoadBalancer(settings=PoolSettings(unhealthy_threshold=1), backend=backend)
    for number in range(3):
        balancer.register_instance(AgentInstance(f"p{number}", "planner"))
    pool = Pool.of(backend.namespace, "planner")
    backend.run(commands.report_checks(pool, 1, [("p0", False)]))
    assert picked(balancer, 6) == {"p1", "p2"}
    backend.run(commands.report_checks(pool, 2, [("p1", False), ("p2", False)]))
    assert balancer.status("planner")[0].panic_for is not None
    assert picked(balancer, 6) == {"p0", "p1", "p2"}
    backend.run(commands.report_checks(pool, 3, [(f"p{n}", True) for n in range(3)]))
    backend.run(commands.report_checks(pool, 4, [(f"p{n}", True) for n in range(3)]))
    assert balancer.status("planner")[0].panic_for is None


def test_check_result_counts_once_and_late_ones_never(backend: Backend) -> None:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner"))
    pool = Pool.of(backend.namespace, "planner")
    for _ in range(5):
        backend.run(commands.report_checks(pool, 10, [("p0", False)]))
    backend.run(commands.report_checks(pool, 9, [("p0", False)]))
    backend.run(commands.report_checks(pool, 11, [("p0", False)]))
    assert states(balancer) == {"p0": InstanceState.UP}
    backend.run(commands.report_checks(pool, 12, [("p0", False)]))
    assert states(balancer) == {"p0": InstanceState.DOWN}
    assert backend.run(commands.report_checks(pool, 13, [("p9", True)])) == ["p9"]


def test_new_instances_are_checked_and_removed_ones_skipped(backend: Backend, raw: Raw) -> None:
    balancer = LoadBalancer(backend=backend)
    pool = Pool.of(backend.namespace, "planner")
    assert backend.run(commands.claim_checks(pool, 1000, 8)).instances == ()
    balancer.register_instance(AgentInstance("p0", "planner"))
    first = backend.run(commands.claim_checks(pool, 60_000, 8))
    assert [each.id for each in first.instances] == ["p0"]
    assert backend.run(commands.claim_checks(pool, 60_000, 8)).instances == ()
    balancer.register_instance(AgentInstance("p1", "planner"))
    assert [each.id for each in backend.run(commands.claim_checks(pool, 60_000, 8)).instances] == ["p1"]
    balancer.remove_instance("planner", "p0")
    assert raw.zrange(keys.pool(backend.namespace, "planner").checks, 0, -1) == ["p1"]


def test_checks_continue_after_an_outage(own_server: Any, connect: Any) -> None:
    backend = connect(own_server.url, deadline=0.3)
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner"))
    calls: Counter[str] = Counter()

    def check(instance: AgentInstance) -> None:
        calls[instance.id] += 1

    with balancer.run_checks("planner", check, interval=0.1, timeout=0.1):
        wait_until(lambda: calls["p0"] > 2, "checks")
        own_server.pause()
        time.sleep(0.5)
        own_server.resume()
        before = calls["p0"]
        wait_until(lambda: calls["p0"] > before + 2, "checks again")


def test_stopped_checks_are_dropped_and_close_stops_others(backend: Backend) -> None:
    balancer = LoadBalancer(backend=backend)
    kept = weakref.ref(stopped := balancer.run_checks("planner", bool))
    assert stopped.running
    stopped.stop()
    assert not stopped.running
    del stopped
    gc.collect()
    assert kept() is None
    checks = balancer.run_checks("planner", bool)
    backend.close()
    assert not checks.running


def test_forked_child_runs_no_checks_of_its_parent(backend: Backend) -> None:
    balancer = LoadBalancer(backend=backend)
    with balancer.run_checks("planner", bool) as checks:

        def child() -> None:
            assert not checks.running
            assert "stopped" in repr(checks)
            checks.stop()
            with balancer.run_checks("planner", bool) as its_own:
                assert its_own.running

        in_child(child)
        assert checks.running
        assert "running" in repr(checks)


def test_invalid_check_arguments_are_refused(call: Call, backend: Backend) -> None:
    balancer = LoadBalancer(backend=backend)
    for argument, given in (("check", {"check": 5}), ("interval", {"interval": 0}), ("timeout", {"timeout": 9.0})):
        with pytest.raises(InvalidArgument) as caught:
            call(balancer, "run_checks", "planner", **{"check": bool, **given})
        assert caught.value.argument == argument


def test_coroutine_check_error_names_the_async_method(backend: Backend) -> None:
    async def check(instance: AgentInstance) -> None: ...

    with pytest.raises(InvalidArgument, match=r"aio\.run_checks"):
        LoadBalancer(backend=backend).run_checks("planner", check)


@pytest.mark.thorough
def test_raising_check_is_logged_again_after_recovery(
    call: Call, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    balancer = LoadBalancer(backend=backend)
    balancer.register_instance(AgentInstance("p0", "planner"))
    calls: Counter[str] = Counter()
    broken = True

    def check(instance: AgentInstance) -> bool:
        calls["broken" if broken else "well"] += 1
        if broken:
            raise NameError("no such name")
        return True

    def logged() -> list[str]:
        return [str(each.exc_info[1]) for each in caplog.records if each.exc_info and each.name == "agentperf_redis"]

    def first_broken_then_well_then_broken() -> bool:
        nonlocal broken
        if calls["broken"] >= 3 and not calls["well"]:
            assert logged() == ["no such name"]
            broken = False
        elif calls["well"] >= 2 and not broken:
            calls["broken"], broken = 0, True
        return broken and calls["well"] >= 2 and calls["broken"] >= 3

    check_until(call, balancer, check, first_broken_then_well_then_broken)
    assert logged() == ["no such name"] * 2
    assert "the check of p0 of planner raised" in caplog.text


def test_plain_check_may_return_an_awaitable(backend: Backend) -> None:
    balancer = LoadBalancer(backend=backend)

    async def answer(good: bool) -> bool:
        await asyncio.sleep(0)
        return good

    for name in ("p0", "p1"):
        balancer.register_instance(AgentInstance(name, "planner"))
    with balancer.run_checks("planner", lambda instance: answer(instance.id == "p0"), interval=0.05):
        wait_until(
            lambda: (
                [each.state for each in balancer.status("planner")[0].instances]
                == [InstanceState.UP, InstanceState.DOWN]
            ),
            "the failing instance to be down",
        )
