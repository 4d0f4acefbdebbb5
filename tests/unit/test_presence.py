"""Tests of when a process sends a heartbeat. tests/integration/metrics/test_workers.py tests what the server does."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis import presence
from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState
from agentperf_redis.presence import ALIVE_S, BEAT_S, FORGET_S, FlushState, OpenCalls, Presence

AWAY = BackendUnavailable("redis://x", "unknown", "no reply")


class Clock:
    """Replaces both clocks of the module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Jobs:
    """A background thread that runs its job when the test calls `run`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.due = 0.0
        self.job: Callable[[], object] = lambda: None
        self.closing = False

    def at(self, due: float, job: Callable[[], object]) -> bool:
        self.due, self.job = due, job
        return True

    def put(self, job: Callable[[], object]) -> bool:
        job()
        return True

    def close(self, limit_s: float) -> bool:
        return True

    def run(self) -> None:
        """Advance the clock to the due time, and run the job."""
        self.clock.now = max(self.clock.now, self.due)
        self.job()


class Stub:
    """A backend that notes the scripts that it runs."""

    process = "host:4711:abc"
    namespace = "n"
    deadline = 5.0

    def __init__(self) -> None:
        self.sent: list[Command[Any]] = []
        self.timeouts: list[float | None] = []
        self.error: AgentPerfError | None = None
        self.closers: list[Callable[[], None]] = []

    def on_close(self, callback: Callable[[], None]) -> None:
        self.closers.append(callback)

    def run(self, command: Command[Any], deadline: float | None = None) -> Any:
        self.sent.append(command)
        self.timeouts.append(deadline)
        if self.error is not None:
            raise self.error
        return command.decode([1, 0]) if names([command]) == ["beat"] else 1


def names(commands: list[Command[Any]]) -> list[str]:
    return [str(command.script.name).removeprefix("namespace/") for command in commands]  # type: ignore[union-attr]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(presence, "time", made)
    return made


@pytest.fixture
def jobs(clock: Clock) -> Jobs:
    return Jobs(clock)


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def own(stub: Stub) -> Presence:
    return Presence(stub)  # type: ignore[arg-type]


def begin(own: Presence, jobs: Jobs) -> None:
    own.begin(jobs)  # type: ignore[arg-type]


def test_two_missed_heartbeats_and_the_end_are_in_order() -> None:
    assert 2 * BEAT_S < ALIVE_S < FORGET_S < 30


def test_nothing_is_sent_before_the_first_use(own: Presence, stub: Stub) -> None:
    assert own.riding() is None
    assert list(own.refreshed()) == []
    own.leave()
    own.close()
    assert stub.sent == []


def test_short_process_sends_nothing(own: Presence, stub: Stub, jobs: Jobs, clock: Clock) -> None:
    begin(own, jobs)
    clock.now += 0.5
    assert own.riding() is None
    own.close()
    jobs.run()
    assert stub.sent == []


def test_idle_process_sends_heartbeats_by_itself(own: Presence, stub: Stub, jobs: Jobs, clock: Clock) -> None:
    begin(own, jobs)
    times = []
    for _ in range(4):
        jobs.run()
        times.append(clock.now - 1000)
    assert names(stub.sent) == ["beat"] * 4
    assert times == pytest.approx([1.1, 6.1, 11.1, 16.1])
    assert set(stub.timeouts) == {1.0}


def test_flushes_carry_the_heartbeats_of_a_busy_process(own: Presence, stub: Stub, jobs: Jobs, clock: Clock) -> None:
    begin(own, jobs)
    carried = []
    for second in range(1, 21):
        clock.now = 1000.0 + second
        if jobs.due <= clock.now:
            jobs.run()
        if own.riding() is not None:
            own.settle(True)
            carried.append(second)
    assert carried == [1, 5, 9, 13, 17]
    assert stub.sent == [], "the thread has nothing left to send"


def test_change_of_the_running_executions_is_carried_at_once(own: Presence, jobs: Jobs, clock: Clock) -> None:
    calls = OpenCalls()
    own.open_calls = lambda now: calls
    begin(own, jobs)
    clock.now += 1
    assert own.riding() is not None
    clock.now += 1
    assert own.riding() is None
    calls = OpenCalls((("planner/a", clock.now - 1.5),), 2)
    heartbeat = own.riding()
    assert heartbeat is not None
    assert isinstance(heartbeat.args, dict)
    assert heartbeat.args["executions..."] == ("planner%2Fa", 1500)
    assert heartbeat.args["more"] == 2
    assert (heartbeat.args["host"], heartbeat.args["pid"], heartbeat.args["age_ms"]) == ("host", 4711, 2000)
    clock.now += 0.5
    calls = OpenCalls()
    assert own.riding() is None, "at most one in 0.9 s"
    clock.now += 0.5
    assert own.riding() is not None


def test_failed_heartbeat_rides_on_no_flush(own: Presence, stub: Stub, jobs: Jobs, clock: Clock) -> None:
    """A node that does not answer must not delay the flushes to the other nodes."""
    begin(own, jobs)
    clock.now += 1
    assert own.riding() is not None
    own.settle(AWAY)
    assert not own.present
    clock.now += 60
    assert own.riding() is None
    stub.error = AWAY
    jobs.run()
    assert own.riding() is None
    stub.error = None
    jobs.run()
    assert own.present
    clock.now += BEAT_S
    assert own.riding() is not None


def test_refused_heartbeat_is_logged_once(
    own: Presence, stub: Stub, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    begin(own, jobs)
    stub.error = CorruptState("n:{workers}:seen", "a string")
    for _ in range(3):
        jobs.run()
    assert caplog.text.count("not in the list of workers") == 1


def test_close_leaves_only_if_the_server_knows_the_process(own: Presence, stub: Stub, jobs: Jobs, clock: Clock) -> None:
    begin(own, jobs)
    jobs.run()
    own.close()
    own.close()
    assert names(stub.sent) == ["beat", "leave"]
    jobs.run()
    assert own.riding() is None
    assert list(own.refreshed()) == []
    assert names(stub.sent) == ["beat", "leave"]


@pytest.mark.parametrize("failing", ["heartbeat", "flush"])
def test_end_does_not_wait_for_a_server_that_is_away(own: Presence, stub: Stub, jobs: Jobs, failing: str) -> None:
    begin(own, jobs)
    jobs.run()
    if failing == "flush":
        own.flush_state = lambda: FlushState(3, 0, "no reply")
    else:
        own.settle(AWAY)
    own.close()
    assert names(stub.sent) == ["beat"]


def test_process_that_left_and_goes_on_is_shown_again(own: Presence, stub: Stub, jobs: Jobs, clock: Clock) -> None:
    begin(own, jobs)
    jobs.run()
    own.leave()
    assert not own.present
    clock.now += 1
    assert own.riding() is not None
    assert own.present
    assert names(stub.sent) == ["beat", "leave"]


def test_reading_sends_a_heartbeat_and_reports_an_outage(own: Presence, jobs: Jobs) -> None:
    begin(own, jobs)
    flow = own.refreshed()
    heartbeat = next(flow)
    assert isinstance(heartbeat, Command)
    assert names([heartbeat]) == ["beat"]
    with pytest.raises(BackendUnavailable):
        flow.throw(AWAY)
    flow = own.refreshed()
    next(flow)
    with pytest.raises(StopIteration):
        flow.throw(CorruptState("n:{workers}:seen", "a string"))


def test_forked_child_is_absent(own: Presence, jobs: Jobs) -> None:
    begin(own, jobs)
    jobs.run()
    own.after_fork()
    assert not own.begun
    assert not own.present
    assert own.riding() is None


def test_long_error_of_a_flush_is_cut(own: Presence, stub: Stub, jobs: Jobs) -> None:
    own.flush_state = lambda: FlushState(3, 2, "é\udc80" * 200)
    begin(own, jobs)
    jobs.run()
    (heartbeat,) = stub.sent
    assert isinstance(heartbeat.args, dict)
    assert (heartbeat.args["pending"], heartbeat.args["dropped"]) == (3, 2)
    assert heartbeat.args["error"] == "é?" * 100


def test_waiting_job_does_not_keep_a_dropped_client(stub: Stub, jobs: Jobs) -> None:
    own = Presence(stub)  # type: ignore[arg-type]
    begin(own, jobs)
    gone = weakref.ref(own)
    stub.closers.clear()
    del own
    gc.collect()
    assert gone() is None
    jobs.run()
    assert stub.sent == []


def test_presence_of_a_closed_client_sends_nothing(jobs: Jobs) -> None:
    backend = Backend("redis://127.0.0.1:1")
    backend.close()
    begin(own := presence.presence_of(backend), jobs)
    assert not own.begun
    assert presence.presence_of(backend) is own
