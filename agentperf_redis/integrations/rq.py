"""RQ: every run of a job is an execution, and a job can lease an instance.

    class Tracked(Worker):
        pass

    instrument(Tracked, perf)    # rq worker --with-scheduler --worker-class workers.Tracked

    @leased(perf.balancer(), "coder")
    def review(path, lease): ...

**Recorded**: each run of a job, under the name of its function (`jobs.review`), with its duration. Spans, `record_llm`
and tool calls within a job belong to it.

| end of the run | counts as |
|---|---|
| result | success |
| an exception, even if the job is retried after it | failure with its type, such as `JobTimeoutException` |
| the process of the job was killed (out of memory, timeout, exit) | failure: `WorkHorseKilled` |
| the job returns `Retry`, or gets no capacity | cancelled: neither success nor failure |
| stopped by `send_stop_job_command` | cancelled |
| the job was cancelled or expired before it ran, or its worker was killed | not an execution |

**Lost**: nothing is lost when a `SimpleWorker` stops, or when a work horse ends. A work horse is the process in which a
`Worker` or `SpawnWorker` runs a job. If the process of a job is killed, its records since its last flush are lost.

Errors of the server never reach a job: records wait in the process. Only `leased` needs the server.
"""

from __future__ import annotations

import functools
import math
import time
from asyncio import CancelledError
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, cast

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.model import Outcome
from agentperf_redis.errors import InvalidArgument, NoCapacity
from agentperf_redis.extras import extra
from agentperf_redis.integrations._leases import LeaseOptions, on_lease, pause_s
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.recording import ExceptionTypes, exception_types

with extra("rq"):
    from rq import Retry, get_current_job
    from rq.timeouts import JobTimeoutException
    from rq.worker import BaseWorker, Worker

F = TypeVar("F", bound=Callable[..., Any])
W = TypeVar("W", bound=type[BaseWorker])

_NO_LIMIT = 1_000_000_000
_KILLED = "WorkHorseKilled"
_UNREADABLE = "unreadable job"


def instrument(worker_class: W, perf: AgentPerf, *, not_failures: ExceptionTypes = ()) -> W:
    """Record every run of a job by workers of this class. The module's docstring says how a run counts.

    Args:
        worker_class: your own subclass of one of RQ's worker classes. It is changed in place. Define it at the top
            level of a module: a SpawnWorker imports its class in the process of each job.
        perf: the server and namespace.
        not_failures: as for `MetricsCollector.track`: exceptions that count as success.

    Returns:
        The class.

    Raises:
        InvalidArgument: for an invalid argument, for one of RQ's own classes, and for a class that is already
            instrumented or inherits from an instrumented class.
    """
    changed = _checked(worker_class)
    checked_perf(perf)
    kept = exception_types("not_failures", not_failures)
    changed.agentperf = perf
    _track_jobs(changed, perf.metrics, kept)
    if issubclass(changed, Worker):
        _count_killed_jobs(changed, perf.metrics)
    return worker_class


def leased(balancer: LoadBalancer, agent_type: str, **options: Unpack[LeaseOptions]) -> Callable[[F], F]:
    """Return a decorator that runs a job's function on a leased instance. The function may be a coroutine function.

    If no instance is free, the job is scheduled to run again after `NoCapacity.retry_after` seconds, plus a random
    extra of up to a quarter of this time, rounded up to whole seconds. This needs a scheduler, as in
    ``rq worker --with-scheduler``. The job can be postponed any number of times, and this uses up none of its own
    retries. Outside a worker, and in a queue with ``is_async=False``, NoCapacity is raised.

    If the function has a parameter `lease`, it gets the `Lease`; callers of the job do not pass it. The outcome of the
    lease is as in `LoadBalancer.lease`, except that JobTimeoutException counts as "timeout".

    Args:
        balancer: the balancer, such as ``perf.balancer()``. With ``on_unavailable="none"``, the job is also scheduled
            again if the server is unreachable.
        agent_type: the pool.
        options: as for `LoadBalancer.lease`. ``wait=`` occupies the worker while the job waits.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    return cast("Callable[[F], F]", on_lease(balancer, agent_type, _put_off, _outcome_of, **options))


def _put_off(error: NoCapacity) -> Retry:
    """Return the result with which a job asks its worker to run it again."""
    job = get_current_job()
    if job is None or job.worker_name in (None, "sync"):  # "sync": the caller runs the job, without a worker
        raise error
    return Retry(max=_NO_LIMIT, interval=math.ceil(pause_s(error)))


def _outcome_of(error: BaseException) -> Outcome | None:
    return Outcome.TIMEOUT if isinstance(error, JobTimeoutException) else None


def _checked(worker_class: Any) -> Any:
    """Check a worker class. Return it with the type Any, so that its methods can be replaced."""
    is_of_workers = isinstance(worker_class, type) and issubclass(worker_class, BaseWorker)
    if not is_of_workers or worker_class.__module__.partition(".")[0] == "rq":
        allowed = "a subclass of your own of a worker class of RQ, so that RQ's class stays as it is"
        raise InvalidArgument("worker_class", worker_class, allowed)
    if hasattr(worker_class, "agentperf"):
        raise InvalidArgument("worker_class", worker_class, "a class that is not instrumented yet")
    return worker_class


def _track_jobs(worker_class: Any, metrics: MetricsCollector, not_failures: tuple[type[BaseException], ...]) -> None:
    """Record `job.perform()`, which a worker calls in the process of the job."""
    perform_job = worker_class.perform_job

    @functools.wraps(perform_job)
    def tracked(self: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        perform = job.perform

        def performing() -> Any:
            span = metrics.track(_agent(job), not_failures=not_failures)
            span.__enter__()
            try:
                result = perform()
            except BaseException as error:
                span.__exit__(type(error), error, None)
                raise
            put_off = CancelledError() if isinstance(result, Retry) else None
            span.__exit__(None if put_off is None else CancelledError, put_off, None)
            return result

        job.perform = performing
        return perform_job(self, job, *args, **kwargs)

    worker_class.perform_job = tracked


def _count_killed_jobs(worker_class: Any, metrics: MetricsCollector) -> None:
    """Record jobs whose process was killed. The worker records them, since it waits for the processes of its jobs."""
    monitor_work_horse, handle_job_failure = worker_class.monitor_work_horse, worker_class.handle_job_failure

    @functools.wraps(monitor_work_horse)
    def monitoring(self: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        self._agentperf_since = time.monotonic()
        try:
            return monitor_work_horse(self, job, *args, **kwargs)
        finally:
            self._agentperf_since = None

    @functools.wraps(handle_job_failure)
    def handling(self: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        since = getattr(self, "_agentperf_since", None)
        if since is not None:  # a failure during `monitor_work_horse` means that the job's process was killed
            seconds = time.monotonic() - since
            if getattr(self, "_stopped_job_id", None) == job.id:
                metrics.record_cancellation(_agent(job), seconds)
            else:
                metrics.record_execution(_agent(job), seconds, False, _KILLED)
        return handle_job_failure(self, job, *args, **kwargs)

    worker_class.monitor_work_horse = monitoring
    worker_class.handle_job_failure = handling


def _agent(job: Any) -> str:
    try:
        return arguments.nearest_name(job.func_name or _UNREADABLE)
    except Exception:  # noqa: BLE001  if a job's data cannot be read, RQ itself makes the job fail
        return _UNREADABLE
