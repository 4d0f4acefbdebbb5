"""The lists of workers and of running executions, with real processes that hang, fork, end or are killed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, keys, presence
from agentperf_redis.backend import Backend
from agentperf_redis.errors import CorruptState
from agentperf_redis.metrics.workers import RunningExecution, WorkerInfo
from agentperf_redis.presence import ALIVE_S, FORGET_S, MAX_EXECUTIONS, OpenCalls, presence_of
from tests.support.calls import Call
from tests.support.forks import in_child
from tests.support.programs import Programs
from tests.support.servers import Raw, Server, wait_until
from tests.support.workers import Workers

HOUR_S = 3600.0
SHOWN_S = 30.0
"""How long a busy machine may take until a heartbeat arrives, s."""


def patient_client(url: str, namespace: str) -> AgentPerf:
    """Return a client that waits for the server when it is closed, however busy the machine is."""
    presence._LEAVE_S = SHOWN_S
    return AgentPerf(url, namespace=namespace)


def hang(url: str, namespace: str, agent: str) -> Generator[None, object, None]:
    """Begin an execution, and end it when the test answers."""
    with patient_client(url, namespace) as perf, perf.metrics.track(agent):
        yield


def hold(url: str, namespace: str, pool: str) -> Generator[None, object, None]:
    """Hold a lease until the test answers, and record nothing."""
    with patient_client(url, namespace) as perf, perf.balancer().lease(pool):
        yield


def record(url: str, namespace: str) -> Generator[None, object, None]:
    """Record one execution. Stay idle afterwards until the test answers."""
    with patient_client(url, namespace) as perf:
        perf.metrics.record_execution("planner", 0.1, True)
        yield


def of(infos: tuple[WorkerInfo, ...], pid: int) -> WorkerInfo | None:
    """Return the worker with this process ID."""
    return next((info for info in infos if info.pid == pid), None)


def shown(perf: AgentPerf, pid: int) -> WorkerInfo:
    """Wait until a process is listed, and return its entry."""
    wait_until(lambda: of(perf.metrics.workers(), pid), f"process {pid} in the list", SHOWN_S)
    found = of(perf.metrics.workers(), pid)
    assert found is not None
    return found


def running(perf: AgentPerf, agent: str) -> RunningExecution:
    """Wait until an execution of an agent is listed, and return it."""
    wait_until(lambda: perf.metrics.running(agent), f"an execution of {agent}", SHOWN_S)
    return perf.metrics.running(agent)[0]


def age_heartbeat(raw: Raw, namespace: str, pid: int, seconds: float) -> None:
    """Make the last heartbeat of a process `seconds` older, as if this time had passed without a heartbeat."""
    seen = keys.workers_seen(namespace)
    (name,) = (name for name in raw.zrange(seen, 0, -1) if f":{pid}:" in name)
    raw.zincrby(seen, -1000 * seconds, name)


def test_worker_finds_itself(perf: AgentPerf, call: Call) -> None:
    assert call(perf.metrics, "workers") == ()
    assert call(perf.metrics, "running") == ()
    perf.metrics.record_execution("planner", 0.1, True)
    (info,) = call(perf.metrics, "workers")
    assert (info.pid, info.alive, info.leases_held, info.pending, info.dropped) == (os.getpid(), True, 0, 0, 0)
    assert (info.error, info.running, info.running_more) == (None, (), 0)
    assert info.host == perf.backend.process.rsplit(":", 2)[0]
    assert 0 <= info.heartbeat_age < SHOWN_S
    assert abs((info.last_seen - info.since).total_seconds()) < SHOWN_S
    assert info.python.count(".") == 2
    perf.balancer().register_instance(AgentInstance("i", "coder"))
    with perf.balancer().lease("coder"):
        assert call(perf.metrics, "workers")[0].leases_held == 1
    assert call(perf.metrics, "workers")[0].leases_held == 0


@pytest.mark.thorough
def test_hung_call_of_a_living_process_grows_older(
    perf: AgentPerf, workers: Workers, server: Server, namespace: str
) -> None:
    worker = workers.start(hang, server.url, namespace, "planner/a b")
    worker.said()
    first = running(perf, "planner/a b")
    assert (first.pid, first.alive) == (worker.pid, True)
    assert first.age >= 1
    wait_until(lambda: perf.metrics.running("planner/a b")[0].age > first.age, "the age to grow")
    assert perf.metrics.running("another") == ()
    (info,) = perf.metrics.workers()
    assert [(each.agent, each.started) for each in info.running] == [("planner/a b", first.started)]
    worker.answer()
    worker.result()
    assert (perf.metrics.running(), of(perf.metrics.workers(), worker.pid)) == ((), None)


@pytest.mark.thorough
def test_hung_call_of_a_killed_process_is_shown_as_dead(
    perf: AgentPerf, raw: Raw, workers: Workers, server: Server, namespace: str
) -> None:
    """The test makes the last heartbeat older instead of waiting; the next test waits."""
    worker = workers.start(hang, server.url, namespace, "planner")
    worker.said()
    before = running(perf, "planner")
    worker.kill()
    age_heartbeat(raw, namespace, worker.pid, ALIVE_S + 0.1)
    (dead,) = perf.metrics.running("planner")
    assert (dead.pid, dead.alive, dead.started) == (worker.pid, False, before.started)
    assert dead.age >= before.age
    assert not of(perf.metrics.workers(), worker.pid).alive  # type: ignore[union-attr]
    age_heartbeat(raw, namespace, worker.pid, FORGET_S - ALIVE_S)
    assert (perf.metrics.workers(), perf.metrics.running()) == ((), ())
    assert raw.pttl(keys.workers_seen(namespace)) <= FORGET_S * 1000
    assert all(0 < raw.pttl(key) <= FORGET_S * 1000 for key in raw.scan_iter(f"{namespace}:{{workers}}:w:*"))


@pytest.mark.thorough
@pytest.mark.waits
def test_killed_process_is_forgotten_within_30_s(
    perf: AgentPerf, raw: Raw, workers: Workers, server: Server, namespace: str
) -> None:
    killed = workers.start(hang, server.url, namespace, "planner")
    living = workers.start(hang, server.url, namespace, "planner")
    for worker in (killed, living):
        worker.said()
        shown(perf, worker.pid)
    wait_until(lambda: len(perf.metrics.running("planner")) == 2, "both hung calls", SHOWN_S)
    killed.kill()
    killed_at = asked_at = time.monotonic()
    while (found := of(perf.metrics.workers(), killed.pid)) is not None:
        assert asked_at - killed_at <= 30
        assert found.alive is (found.heartbeat_age <= ALIVE_S)
        assert [(each.agent, each.alive) for each in found.running] == [("planner", found.alive)]
        time.sleep(0.1)
        asked_at = time.monotonic()
    assert {each.pid: each.alive for each in perf.metrics.running()} == {living.pid: True}
    assert [info.pid for info in perf.metrics.workers()] == [living.pid]
    assert not [key for key in raw.scan_iter(f"{namespace}:{{workers}}:w:*") if f":{killed.pid}:" in key]


def test_process_with_leases_only_is_a_worker(
    perf: AgentPerf, workers: Workers, server: Server, namespace: str
) -> None:
    perf.balancer().register_instance(AgentInstance("i", "coder"))
    worker = workers.start(hold, server.url, namespace, "coder")
    worker.said()
    info = shown(perf, worker.pid)
    assert (info.leases_held, info.alive, info.running) == (1, True, ())
    assert of(perf.metrics.workers(), os.getpid()) is None, "registering and reading make no worker"
    worker.answer()
    worker.result()
    assert perf.metrics.workers() == ()


@pytest.mark.thorough
@pytest.mark.waits
def test_idle_process_stays_a_worker(perf: AgentPerf, workers: Workers, server: Server, namespace: str) -> None:
    worker = workers.start(record, server.url, namespace)
    worker.said()
    first = shown(perf, worker.pid)

    def beats_later() -> bool:
        found = of(perf.metrics.workers(), worker.pid)
        return found is not None and (found.last_seen - first.last_seen).total_seconds() > ALIVE_S

    wait_until(beats_later, "further heartbeats", ALIVE_S + SHOWN_S)
    assert shown(perf, worker.pid).since == first.since
    worker.answer()
    worker.result()
    assert perf.metrics.workers() == ()


@pytest.mark.thorough
def test_execution_that_ended_is_removed_by_the_flush_of_its_record(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    name = keys.worker(namespace, keys.worker_name(perf.backend.process))

    def stored() -> str:
        return str(raw.hget(name, "running") or "")

    with perf.metrics.track("planner"):
        perf.metrics.record_execution("other", 0.1, True)
        wait_until(lambda: stored().startswith("planner "), "the execution on the server", SHOWN_S)
    wait_until(lambda: stored() == "", "its end", SHOWN_S)


def test_each_worker_lists_its_oldest_executions(perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentperf_redis.metrics.flusher.MIN_AGE_S", 0.0)
    spans = [perf.metrics.track(f"agent-{number:02d}").__enter__() for number in range(MAX_EXECUTIONS + 5)]
    (info,) = perf.metrics.workers()
    assert [each.agent for each in info.running] == [f"agent-{number:02d}" for number in range(MAX_EXECUTIONS)]
    assert info.running_more == 5
    for span in spans:
        span.__exit__(None, None, None)
    assert perf.metrics.running() == ()


def test_forked_child_starts_without_executions(perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentperf_redis.metrics.flusher.MIN_AGE_S", 0.0)

    def child() -> None:
        with perf.metrics.track("child"):
            found = sorted((each.agent, each.pid == os.getpid()) for each in perf.metrics.running())
            assert (found, len(perf.metrics.workers())) == ([("child", True), ("parent", False)], 2)
        perf.close()

    with perf.metrics.track("parent"):
        assert [each.pid for each in perf.metrics.running()] == [os.getpid()]
        in_child(child)
        (info,) = perf.metrics.workers()
        assert (info.pid, [each.agent for each in info.running]) == (os.getpid(), ["parent"])


ENDING = """
    import multiprocessing
    from agentperf_redis import AgentPerf, presence

    presence._LEAVE_S = 30.0
    perf = AgentPerf()

    def work():
        perf.metrics.record_execution("worker", 0.1, True)
        assert len(perf.metrics.workers()) == 1
        perf.metrics.flush()

    if __name__ == "__main__":
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert perf.metrics.workers() == ()
"""


def test_child_that_ends_without_close_leaves_at_once(programs: Programs, counted: Callable[[], int]) -> None:
    programs.write("ending.py", ENDING)
    programs.run("ending")
    assert counted() == 1, programs.log()


@pytest.mark.thorough
def test_failing_heartbeat_disturbs_no_flush(
    perf: AgentPerf, raw: Raw, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    presence, seen = presence_of(perf.backend), keys.workers_seen(namespace)
    perf.metrics.record_execution("planner", 0.1, True)
    wait_until(lambda: presence.present, "the first heartbeat", SHOWN_S)
    raw.set(seen, "x")
    perf.metrics.record_execution("planner", 0.1, True)
    wait_until(lambda: not presence.present, "a heartbeat that fails", SHOWN_S)
    perf.metrics.flush()
    assert perf.metrics.get_or_create_metrics("planner").task_count == 2
    with pytest.raises(CorruptState, match="seen"):
        perf.metrics.workers()
    assert [each.message for each in caplog.records if "list of workers" in each.message][1:] == []
    raw.delete(seen)
    assert len(perf.metrics.workers()) == 1
    assert presence.present


@pytest.mark.parametrize(
    ("field", "value"),
    [("pid", "x"), ("since_ms", "253402300800000"), ("running", "planner"), ("running", "planner x"), ("leases", "-1")],
)
def test_damaged_record_is_named(perf: AgentPerf, raw: Raw, namespace: str, field: str, value: str) -> None:
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.workers()
    name = "elsewhere:1:0"
    raw.copy(keys.worker(namespace, keys.worker_name(perf.backend.process)), keys.worker(namespace, name))
    raw.zadd(keys.workers_seen(namespace), {name: int(raw.time()[0]) * 1000})
    assert len(perf.metrics.workers()) == 2
    raw.hset(keys.worker(namespace, name), field, value)
    with pytest.raises(CorruptState, match="elsewhere"):
        perf.metrics.running()


def test_workers_beyond_the_limit_are_not_recorded(
    perf: AgentPerf, connect: Callable[..., Backend], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "MAX_WORKERS", 2)
    clients = [presence_of(connect(server.url)) for _ in range(3)]
    run = perf.backend.run
    assert [run(client.heartbeat(OpenCalls())) for client in clients] == [True, True, False]
    assert len(perf.metrics.workers()) == 2
    assert [run(client.heartbeat(OpenCalls())) for client in clients] == [True, True, False], "they keep their places"
    run(clients[0].departure())
    assert [run(client.heartbeat(OpenCalls())) for client in reversed(clients)] == [True, True, False]


def test_heartbeats_from_before_a_clock_change_are_ignored(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    perf.metrics.record_execution("planner", 0.1, True)
    perf.metrics.workers()
    seen, own = keys.workers_seen(namespace), keys.worker_name(perf.backend.process)
    raw.copy(keys.worker(namespace, own), keys.worker(namespace, "elsewhere:1:0"))
    raw.zadd(seen, {"elsewhere:1:0": (time.time() + HOUR_S) * 1000})
    assert len(perf.metrics.workers()) == 1
    assert raw.zrange(seen, 0, -1) == [own]


def test_executions_of_threads_are_listed(perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentperf_redis.metrics.flusher.MIN_AGE_S", 0.0)
    go = threading.Event()
    begun = threading.Barrier(4)

    def work(number: int) -> None:
        with perf.metrics.track(f"thread-{number}"), perf.metrics.span(f"thread-{number}", "stage"):
            begun.wait(60)
            go.wait(60)

    threads: list[Any] = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    assert {each.agent for each in perf.metrics.running()} == {"thread-0", "thread-1", "thread-2"}
    go.set()
    for thread in threads:
        thread.join()
    assert perf.metrics.running() == ()
