"""`agentperf_redis.integrations.celery` with the real Celery. Tests with a real worker have the marker `thorough`."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, InvalidArgument, NoCapacity
from tests.support.programs import LIMIT_S, Programs
from tests.support.recipes import recipe
from tests.support.servers import Server

pytest.importorskip("celery", reason="needs the extra celery")
pytestmark = pytest.mark.servers("valkey")  # the kind of server does not affect these tests

OF_TEST = """
from agentperf_redis import AgentInstance
perf.balancer().register_instance(AgentInstance("coder-1", "coder", max_capacity=4))
app.conf.update(result_backend=app.conf.broker_url, task_default_queue=perf.backend.namespace, result_expires=600,
                broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)
"""
OUTCOMES = """
import os, signal, sys, time
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

@app.task
def fails():
    raise LookupError("as the test wants")

@app.task(bind=True, autoretry_for=(ConnectionError,), default_retry_delay=0, retry_backoff=False, max_retries=3)
def retried(self):
    if self.request.retries < 2:
        raise ConnectionError("as the test wants")

@app.task(bind=True, default_retry_delay=0, max_retries=5)
def polls(self):
    if self.request.retries < 3:
        raise self.retry()

@app.task(soft_time_limit=1)
def soft():
    time.sleep(60)

@app.task(soft_time_limit=1)
def soft_caught():
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        pass

@app.task(time_limit=1)
def hard():
    perf.metrics.flush()  # the tasks before this one
    time.sleep(60)

@app.task
def killed():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)

@app.task
def exits():
    sys.exit(3)

@app.task
def ignores():
    raise Ignore

@app.task(acks_late=True)
def rejects():
    raise Reject(KeyError("as the test wants"), requeue=False)

@app.task
def returns_an_error():
    return repr(LookupError())

@app.task(bind=True)
def replaced(self):
    raise self.replace(add.s(1, 2))

@app.task
def add(one, two):
    perf.metrics.record_llm(model="m", tokens_in=one, tokens_out=two)
    return one + two

@app.task
def revoked():
    print("revoked begins", flush=True)
    time.sleep(60)
"""


def start(programs: Programs, *options: str, more: str = "") -> subprocess.Popen[bytes]:
    shown = recipe("celery").replace("redis://localhost:6379/1", programs.broker)
    programs.write("tasks.py", shown + OF_TEST + more)
    return programs.start("celery", "-A", "tasks", "worker", "--loglevel", "warning", *options)


def end(worker: subprocess.Popen[bytes], programs: Programs) -> None:
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0, programs.log()


def counts(perf: AgentPerf, name: str) -> tuple[int, dict[str, int], int]:
    """Return the successes, the failures by type and the cancellations of a task."""
    found = perf.metrics.get_or_create_metrics(f"tasks.{name}")
    return found.success_count, dict(found.error_types), found.cancelled_count


CLIENT = """
import tasks
names = [f"{number}.py" for number in range(30)]
results = [tasks.review.delay(name) for name in names]
assert [result.get(timeout=60) for result in results] == [f"{name} on coder-1" for name in names]
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        "--concurrency=2 --max-tasks-per-child=1",
        "--concurrency=6 --max-tasks-per-child=2",
        "--concurrency=2",
        "--pool=solo",
        "--pool=threads --concurrency=3",
        "--pool=gevent --concurrency=3",
    ],
)
def test_every_run_of_a_task_is_counted(programs: Programs, perf: AgentPerf, options: str) -> None:
    if "gevent" in options:
        pytest.importorskip("gevent")
    worker = start(programs, *options.split())
    programs.write("client.py", CLIENT)
    programs.run("client")
    end(worker, programs)
    successes, errors, _ = counts(perf, "review")
    assert (successes, errors) == (30, {})
    assert perf.balancer().status("coder")[0].instances[0].served == 30
    assert not [name for name in perf.metrics.snapshots() if name != "tasks.review"]


OUTCOMES_CLIENT = """
import tasks, time
from celery.result import AsyncResult
for name in {names!r}:
    result = tasks.app.tasks["tasks." + name].delay()
    try:
        result.get(timeout=60)
    except Exception as error:
        print(name, repr(error), flush=True)
"""
EXPECTED: dict[str, tuple[int, dict[str, int], int]] = {
    "fails": (0, {"LookupError": 1}, 0),
    "retried": (1, {"ConnectionError": 2}, 0),
    "polls": (1, {}, 3),
    "soft": (0, {"SoftTimeLimitExceeded": 1}, 0),
    "soft_caught": (1, {}, 0),
    "hard": (0, {"TimeLimitExceeded": 1}, 0),
    "killed": (0, {"WorkerLostError": 1}, 0),
    "exits": (0, {"WorkerLostError": 1}, 0),
    "rejects": (0, {"KeyError": 1}, 0),
    "returns_an_error": (1, {}, 0),
    "replaced": (1, {}, 0),
}


@pytest.mark.thorough
def test_outcome_of_each_end_is_as_documented(programs: Programs, perf: AgentPerf) -> None:
    worker = start(programs, "--concurrency=1", more=OUTCOMES)
    programs.write("client.py", OUTCOMES_CLIENT.format(names=list(EXPECTED)))
    programs.run("client")
    programs.write("ignoring.py", "import tasks\ntasks.ignores.delay()\ntasks.add.delay(1, 2).get(timeout=60)")
    programs.run("ignoring")
    end(worker, programs)
    assert {name: counts(perf, name) for name in EXPECTED} == EXPECTED, programs.log()
    assert counts(perf, "ignores") == (1, {}, 0)
    added = perf.metrics.get_or_create_metrics("tasks.add")
    assert (added.success_count, added.llm_calls, added.tokens_in, added.tokens_out) == (2, 2, 2, 4)
    assert perf.metrics.get_or_create_metrics("tasks.hard").min_execution_time > 0.9
    assert perf.metrics.get_or_create_metrics("tasks.killed").min_execution_time > 0.2


@pytest.mark.thorough
def test_terminated_task_is_cancelled_and_unstarted_one_not_counted(programs: Programs, perf: AgentPerf) -> None:
    worker = start(programs, "--concurrency=1", more=OUTCOMES)
    programs.write(
        "client.py",
        """
        import sys, tasks, time
        first, second = tasks.revoked.delay(), tasks.revoked.delay()
        while "revoked begins" not in open("log").read():
            time.sleep(0.05)
        second.revoke()
        first.revoke(terminate=True)
        for each in (first, second):
            while each.state != "REVOKED":
                time.sleep(0.05)
        tasks.add.delay(1, 2).get(timeout=60)
        """,
    )
    programs.run("client")
    end(worker, programs)
    assert counts(perf, "revoked") == (0, {}, 1), programs.log()
    assert counts(perf, "add") == (1, {}, 0)


BUSY = """
import time
perf.balancer().register_instance(AgentInstance("only", "narrow", max_capacity=1))

@app.task(max_retries=0)
@leased(perf.balancer(), "narrow")
def narrow(seconds, *, lease):
    time.sleep(seconds)
    return lease.instance_id

@app.task(bind=True, max_retries=1)
@leased(perf.balancer(), "narrow")
def bound(self, seconds):
    return self.request.retries
"""


@pytest.mark.thorough
def test_task_without_capacity_runs_later_and_keeps_its_retries(programs: Programs, perf: AgentPerf) -> None:
    worker = start(programs, "--concurrency=4", "--loglevel=info", more=BUSY)
    programs.write(
        "client.py",
        """
        import tasks
        results = [tasks.narrow.delay(0.3) for _ in range(6)] + [tasks.bound.delay(seconds=0.1) for _ in range(4)]
        assert [each.get(timeout=60) for each in results] == ["only"] * 6 + [0] * 4
        """,
    )
    programs.run("client")
    end(worker, programs)
    (instance,) = (each for each in perf.balancer().status("narrow")[0].instances)
    assert (instance.peak_load, instance.served, instance.failed) == (1, 10, 0)
    narrow, bound = counts(perf, "narrow"), counts(perf, "bound")
    assert (narrow[:2], bound[:2]) == ((6, {}), (4, {}))
    assert narrow[2] + bound[2] > 0
    pauses = [
        (float(pause), float(retry_after))
        for pause, retry_after in re.findall(r"Retry in ([\d.]+)s: NoCapacity\(.*, ([\d.]+), False\)", programs.log())
    ]
    assert len(pauses) >= narrow[2] + bound[2]
    assert all(retry_after <= pause <= 1.25 * retry_after for pause, retry_after in pauses)


@pytest.fixture
def app(perf: AgentPerf) -> Iterator[Any]:
    """An instrumented app whose tasks run in the calling thread."""
    from celery import Celery

    from agentperf_redis.integrations.celery import instrument

    made = Celery("eager", broker="memory://", set_as_current=False)
    made.conf.update(task_always_eager=True)
    instrument(made, perf)
    yield made
    made.close()


def task(app: Any, name: str) -> Callable[[Callable[..., Any]], Any]:
    """Return Celery's task decorator `app.task(name=name)` with a type. Celery itself gives it no type."""
    made: Callable[[Callable[..., Any]], Any] = app.task(name=name)
    return made


def test_eager_tasks_are_counted_with_their_errors(app: Any, perf: AgentPerf) -> None:
    @task(app, "works")
    def works() -> int:
        perf.metrics.record_llm(tokens_in=7)
        with perf.metrics.span("works", "stage"):
            return 1

    @task(app, "fails")
    def fails() -> None:
        works.delay()
        raise LookupError

    @task(app, "returns")
    def returns() -> Exception:
        return LookupError()

    works.delay()
    fails.delay()
    with pytest.raises(LookupError):
        fails.apply(throw=True)
    returns.delay()
    found = perf.metrics.snapshots()
    assert {name: (each.success_count, dict(each.error_types)) for name, each in found.items()} == {
        "works": (3, {}),
        "fails": (0, {"LookupError": 2}),
        "returns": (1, {}),
    }
    assert found["works"].tokens_in == 21
    assert [span.name for span in perf.metrics.spans("works").spans if span.path] == ["stage"]


def test_tasks_of_other_apps_are_not_counted(app: Any, perf: AgentPerf) -> None:
    from celery import Celery

    other = Celery("other", broker="memory://", set_as_current=False)
    other.conf.update(task_always_eager=True)

    @task(other, "foreign")
    def foreign() -> None: ...

    foreign.delay()
    assert perf.metrics.snapshots() == {}


def test_lease_reaches_the_function_and_reports_outcomes(app: Any, perf: AgentPerf) -> None:
    from celery import exceptions

    from agentperf_redis.integrations.celery import leased

    balancer = perf.balancer()
    balancer.register_instance(AgentInstance("coder-1", "coder", max_capacity=1))

    @task(app, "leasing")
    @leased(balancer, "coder")
    def leasing(error: str | None, lease: Any) -> str:
        assert balancer.acquire("coder") is None
        if error is not None:
            raise getattr(exceptions, error)
        return str(lease.instance_id)

    assert leasing(None) == "coder-1"
    assert leasing.delay(None).get() == "coder-1"
    with pytest.raises(TypeError):
        leasing.delay(None, "another argument")
    for error in ("TaskError", "SoftTimeLimitExceeded", "Ignore"):
        leasing.delay(error)
    (instance,) = balancer.status("coder")[0].instances
    assert (instance.served, instance.failed, instance.instance.current_load) == (2, 2, 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda lease, one, two=0: (one, two, lease.instance_id),
        lambda one, lease, two=0: (one, two, lease.instance_id),
        lambda one, two=0, *, lease: (one, two, lease.instance_id),
        lambda lease, /, one, two=0: (one, two, lease.instance_id),
        lambda lease, *numbers, **named: (*numbers, *named.values(), lease.instance_id),
    ],
    ids=["first", "between", "keyword", "positional", "variable"],
)
def test_lease_parameter_may_stand_anywhere(app: Any, perf: AgentPerf, function: Any) -> None:
    from agentperf_redis.integrations.celery import leased

    balancer = perf.balancer()
    balancer.register_instance(AgentInstance("coder-1", "coder", max_capacity=1))
    function.__name__ = "leasing"  # celery compiles a function with this name, so the name must be an identifier
    leasing = task(app, "leasing")(leased(balancer, "coder")(function))
    for args, named in (((1, 2), {}), ((1,), {"two": 2}), ((), {"one": 1, "two": 2})):
        assert leasing.apply_async(args, named).get() == (1, 2, "coder-1")


def test_proxy_of_an_app_is_instrumented_as_the_app(app: Any, perf: AgentPerf) -> None:
    from celery.local import Proxy

    from agentperf_redis.integrations.celery import instrument

    fresh = type(app)("behind a proxy", set_as_current=False)
    instrument(Proxy(lambda: fresh), perf)  # celery.current_app is such a proxy
    with pytest.raises(InvalidArgument, match="not instrumented yet"):
        instrument(fresh, perf)


def test_no_capacity_is_raised_outside_a_worker(app: Any, perf: AgentPerf) -> None:
    from agentperf_redis.integrations.celery import leased

    @task(app, "leasing")
    @leased(perf.balancer(), "nobody")
    def leasing() -> None: ...

    with pytest.raises(NoCapacity):
        leasing()
    assert isinstance(leasing.delay().result, NoCapacity)


def test_wrong_arguments_are_named(app: Any, perf: AgentPerf) -> None:
    from agentperf_redis.integrations.celery import instrument, leased

    def wrong(words: str, call: Any) -> None:
        with pytest.raises(InvalidArgument, match=words):
            call()

    wrong("not instrumented yet", lambda: instrument(app, perf))
    wrong("app", lambda: instrument(perf, perf))  # type: ignore[arg-type,unused-ignore]
    wrong("perf", lambda: instrument(app, app))
    wrong("not_failures", lambda: instrument(type(app)("third"), perf, not_failures=3))  # type: ignore[arg-type]
    wrong("balancer", lambda: leased(perf, "coder"))  # type: ignore[arg-type]
    wrong("wait", lambda: leased(perf.balancer(), "coder", wait=-1))
    wrong("function", lambda: leased(perf.balancer(), "coder")(3))  # type: ignore[type-var]


def test_two_apps_of_a_process_are_counted_each_by_its_own(
    app: Any, perf: AgentPerf, server: Server, namespace: str
) -> None:
    from celery import Celery

    from agentperf_redis.integrations.celery import instrument

    def work() -> None: ...

    second = Celery("second", broker="memory://", set_as_current=False)
    second.conf.update(task_always_eager=True)
    with AgentPerf(server.url, namespace=f"{namespace}.2") as other:
        instrument(second, other)
        task(app, "first")(work).delay()
        task(second, "second")(work).delay()
        assert (list(perf.metrics.snapshots()), list(other.metrics.snapshots())) == (["first"], ["second"])


class Received:
    """A task that the main process of a worker has received, and that began two seconds ago in a pool process."""

    def __init__(self, app: Any, name: str) -> None:
        self.app, self.id, self.time_start = app, name, time.time() - 2


def test_main_process_counts_a_killed_run_once(app: Any, perf: AgentPerf) -> None:
    from celery import signals
    from celery.exceptions import Retry, WorkerLostError

    @task(app, "work")
    def work() -> None: ...

    received = [Received(app, name) for name in ("revoked", "ended", "cancelled", "lost", "failed")]
    for each in received:
        signals.task_received.send(sender=None, request=each)
    revoked, ended, cancelled, lost, failed = received
    for _ in range(2):
        signals.task_revoked.send(sender=work, request=revoked, terminated=True, signum=15, expired=False)
        signals.task_revoked.send(sender=work, request=ended, terminated=False, signum=None, expired=False)
        signals.task_retry.send(sender=work, request=cancelled, einfo=None)
        reason = Retry(exc=WorkerLostError("as the test wants"))
        signals.task_retry.send(sender=work, request=lost, reason=reason, einfo=None)
        signals.task_failure.send(sender=work, task_id=failed.id, exception=LookupError("counted by the pool process"))
    found = perf.metrics.get_or_create_metrics("work")
    assert (found.task_count, found.cancelled_count) == (3, 2)
    assert found.error_types == {"WorkerLostError": 1}
    assert found.min_execution_time >= 2
