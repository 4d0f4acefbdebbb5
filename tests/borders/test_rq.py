"""`agentperf_redis.integrations.rq` with the real RQ. Tests with a real worker have the marker `thorough`."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, InvalidArgument, NoCapacity
from tests.support.programs import LIMIT_S, Programs
from tests.support.recipes import recipe
from tests.support.servers import Server, wait_until

pytest.importorskip("rq", reason="needs the extra rq")
pytestmark = pytest.mark.servers("valkey")  # the kind of server does not affect these tests

OF_TEST = """
from agentperf_redis import AgentInstance
from agentperf_redis.integrations.rq import leased
perf.balancer().register_instance(AgentInstance("coder-1", "coder", max_capacity=4))

@leased(perf.balancer(), "coder")
def review(path, lease):
    return f"{path} on {lease.instance_id}"
"""
OUTCOMES = """
import os, signal, sys, time
from rq import Retry

def fails():
    raise LookupError("as the test wants")

def times_out():
    time.sleep(60)

def killed():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)

def leaves():
    os._exit(3)

def exits():
    sys.exit(3)

def returns_an_error():
    return repr(LookupError())

def retries():
    return Retry(max=2)

def add(one, two):
    perf.metrics.record_llm(model="m", tokens_in=one, tokens_out=two)
    return one + two

async def awaits():
    return 1

def stopped():
    print("stopped begins", flush=True)
    time.sleep(60)
"""
QUEUE = """
import os, time
from redis import Redis
from rq import Queue, Retry
from rq.command import send_stop_job_command
connection = Redis.from_url(os.environ["BROKER"])
queue = Queue(os.environ["AGENTPERF_NAMESPACE"], connection=connection)
"""


def work(
    programs: Programs, namespace: str, *options: str, kind: str = "Worker", more: str = ""
) -> subprocess.Popen[bytes]:
    """Start a worker of the recipe."""
    shown = recipe("rq").replace("from rq import Worker", f"from rq.worker import {kind} as Worker")
    programs.write("jobs.py", shown + OF_TEST + more)
    shared = ("--url", programs.broker, "--worker-class", "jobs.Tracked", "--logging_level", "WARNING")
    return programs.start("rq.cli", "worker", *shared, *options, namespace)


def counts(perf: AgentPerf, name: str) -> tuple[int, dict[str, int], int]:
    """Return the successes, the failures by type and the cancellations of a job."""
    found = perf.metrics.get_or_create_metrics(f"jobs.{name}")
    return found.success_count, dict(found.error_types), found.cancelled_count


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["Worker", "SpawnWorker", "SimpleWorker"])
def test_every_run_of_a_job_is_counted(programs: Programs, perf: AgentPerf, namespace: str, kind: str) -> None:
    count = 6 if kind == "SpawnWorker" else 20
    programs.write("client.py", QUEUE + f"for number in range({count}): queue.enqueue('jobs.review', str(number))")
    programs.run("client")
    worker = work(programs, namespace, "--burst", kind=kind)
    assert worker.wait(LIMIT_S) == 0, programs.log()
    assert counts(perf, "review") == (count, {}, 0), programs.log()
    assert perf.balancer().status("coder")[0].instances[0].served == count
    assert set(perf.metrics.snapshots()) == {"jobs.review"}


OUTCOMES_CLIENT = """
for name in ("returns_an_error", "fails", "killed", "leaves", "exits", "retries", "awaits"):
    queue.enqueue("jobs." + name)
queue.enqueue("jobs.times_out", job_timeout=1)
queue.enqueue("jobs.fails", retry=Retry(max=2))
queue.enqueue("jobs.add", 1, 2)
queue.enqueue("jobs.missing")
"""


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["Worker", "SpawnWorker"])
def test_outcome_of_each_end_is_as_documented(programs: Programs, perf: AgentPerf, namespace: str, kind: str) -> None:
    programs.write("client.py", QUEUE + OUTCOMES_CLIENT)
    programs.run("client")
    worker = work(programs, namespace, "--burst", kind=kind, more=OUTCOMES)
    assert worker.wait(LIMIT_S) == 0, programs.log()
    expected: dict[str, tuple[int, dict[str, int], int]] = {
        "returns_an_error": (1, {}, 0),
        "fails": (0, {"LookupError": 4}, 0),
        "killed": (0, {"WorkHorseKilled": 1}, 0),
        "leaves": (0, {"WorkHorseKilled": 1}, 0),
        "exits": (0, {"SystemExit": 1}, 0),
        "retries": (0, {}, 3),
        "awaits": (1, {}, 0),
        "times_out": (0, {"JobTimeoutException": 1}, 0),
        "add": (1, {}, 0),
    }
    assert {name: counts(perf, name) for name in expected} == expected, programs.log()
    assert perf.metrics.get_or_create_metrics("jobs.missing").failure_count == 1
    added = perf.metrics.get_or_create_metrics("jobs.add")
    assert (added.llm_calls, added.tokens_in, added.tokens_out) == (1, 1, 2)


@pytest.mark.thorough
def test_stopped_job_is_cancelled(programs: Programs, perf: AgentPerf, namespace: str) -> None:
    worker = work(programs, namespace, more=OUTCOMES)
    programs.write(
        "client.py",
        QUEUE
        + """
job = queue.enqueue("jobs.stopped")
while "stopped begins" not in open("log").read():
    time.sleep(0.05)
send_stop_job_command(connection, job.id)
while job.get_status() != "stopped":
    time.sleep(0.05)
""",
    )
    programs.run("client")
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0, programs.log()
    assert counts(perf, "stopped") == (0, {}, 1), programs.log()


BUSY = """
import time
perf.balancer().register_instance(AgentInstance("only", "narrow", max_capacity=1))

@leased(perf.balancer(), "narrow")
def narrow(seconds, *, lease):
    time.sleep(seconds)
    return lease.instance_id

@leased(perf.balancer(), "narrow")
async def awaiting(seconds):
    return "awaited"
"""


@pytest.mark.thorough
def test_job_without_capacity_runs_later(programs: Programs, perf: AgentPerf, namespace: str) -> None:
    balancer = perf.balancer()
    balancer.register_instance(AgentInstance("only", "narrow", max_capacity=1))
    held = balancer.acquire("narrow")
    worker = work(programs, namespace, "--with-scheduler", more=BUSY)
    programs.write(
        "client.py",
        QUEUE
        + """
jobs = [queue.enqueue("jobs.narrow", 0.1), queue.enqueue("jobs.awaiting", 0.1)]
while len(queue.scheduled_job_registry) < 2:
    time.sleep(0.05)
print("both wait", flush=True)
while any(job.get_status() != "finished" for job in jobs):
    time.sleep(0.05)
assert [job.return_value() for job in jobs] == ["only", "awaited"]
""",
    )
    client = programs.start("client")
    wait_until(lambda: programs.said("both wait"), "the jobs to wait", LIMIT_S)
    balancer.release(held)
    assert client.wait(LIMIT_S) == 0, programs.log()
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0, programs.log()
    narrow, awaiting = counts(perf, "narrow"), counts(perf, "awaiting")
    assert (narrow[:2], awaiting[:2]) == ((1, {}), (1, {}))
    assert min(narrow[2], awaiting[2]) >= 1


def test_no_capacity_is_raised_outside_a_worker(perf: AgentPerf) -> None:
    from agentperf_redis.integrations.rq import leased

    @leased(perf.balancer(), "nobody")
    def job() -> None: ...

    with pytest.raises(NoCapacity):
        job()


def test_simple_worker_counts_jobs_in_its_process(perf: AgentPerf, server: Server, namespace: str) -> None:
    from redis import Redis
    from rq import Queue, SimpleWorker

    from agentperf_redis.integrations.rq import instrument

    tracked: Any = type("Tracked", (SimpleWorker,), {})
    assert instrument(tracked, perf, not_failures=ZeroDivisionError) is tracked
    with Redis(port=server.port, db=1) as connection:
        queue = Queue(namespace, connection=connection)
        queue.enqueue("operator.floordiv", 6, 3)
        queue.enqueue("operator.floordiv", 1, 0)
        queue.enqueue("operator.getitem", {}, 0)
        tracked([queue], connection=connection).work(burst=True, logging_level="ERROR")
    found = perf.metrics.snapshots()
    assert found["operator.floordiv"].success_count == 2
    assert found["operator.getitem"].error_types == {"KeyError": 1}


def test_wrong_arguments_are_named(perf: AgentPerf) -> None:
    from rq import SimpleWorker

    from agentperf_redis.integrations.rq import instrument, leased

    tracked: Any = type("Tracked", (SimpleWorker,), {})
    heir: Any = type("Heir", (tracked,), {})

    def wrong(words: str, call: Any) -> None:
        with pytest.raises(InvalidArgument, match=words):
            call()

    wrong("subclass of your own", lambda: instrument(SimpleWorker, perf))
    wrong("subclass of your own", lambda: instrument(int, perf))  # type: ignore[type-var,unused-ignore]
    wrong("perf", lambda: instrument(tracked, "perf"))  # type: ignore[arg-type]
    wrong("not_failures", lambda: instrument(tracked, perf, not_failures=3))  # type: ignore[arg-type]
    instrument(tracked, perf)
    wrong("not instrumented yet", lambda: instrument(heir, perf))
    wrong("balancer", lambda: leased(perf, "coder"))  # type: ignore[arg-type]
