"""Celery: every run of a task is an execution, and a task can lease an instance.

    instrument(app, perf)

    @app.task
    @leased(perf.balancer(), "coder")
    def review(path, lease): ...

**Recorded**: each run of a task, under the name of the task, with its duration. Celery's own tasks (`celery.*`) are
not recorded. Spans, `record_llm` and tool calls within a task belong to its execution.

| end of the run | counts as |
|---|---|
| result, `Ignore`, `task.replace` | success |
| an exception, even if the task is retried after it | failure with the type of the exception |
| `SoftTimeLimitExceeded` that the task does not catch | failure with that type |
| hard time limit | failure with the type `TimeLimitExceeded` |
| the process was killed or exited (for example, out of memory) | failure with the type `WorkerLostError` |
| `Reject` without requeue | failure with the type of its reason if that is an exception, otherwise `Reject` |
| `task.retry()` without `exc=`, no capacity, `Reject(requeue=True)` | cancelled: neither success nor failure |
| revoked with `terminate=True`, or cancelled by the worker | cancelled |
| revoked or expired before it ran | not an execution |

If a process is killed, the main process of the worker counts the execution that ran in it.

**Lost**: nothing is lost when processes are recycled (`--max-tasks-per-child`) or the worker shuts down warmly. A
process killed by a hard limit loses the executions that it finished since its last flush, at most those of one second.
A cold shutdown loses as many executions, unless `AgentPerf(flush_on_sigterm=True)` is used. If a run is killed and
`task_reject_on_worker_lost` sends the task again, only the repeated run is counted, when it ends.

Recording never raises an error of the server in a task: records wait in the process. Only `leased` needs the server.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from asyncio import CancelledError
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, cast

from agentperf_redis import arguments, process_end
from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.model import Outcome
from agentperf_redis.errors import InvalidArgument, NoCapacity
from agentperf_redis.extras import extra
from agentperf_redis.integrations._leases import LeaseOptions, on_lease, pause_s
from agentperf_redis.metrics.recording import ExceptionTypes, exception_types
from agentperf_redis.metrics.spans import Span

with extra("celery"):
    from celery import Celery, current_task, signals
    from celery.exceptions import (
        Ignore,
        Reject,
        Retry,
        SoftTimeLimitExceeded,
        TimeLimitExceeded,
        WorkerLostError,
    )
    from celery.local import Proxy
    from celery.states import SUCCESS

F = TypeVar("F", bound=Callable[..., Any])

_OWN_TASKS = "celery."
_SPAN = "_agentperf_span"
"""Attribute of a task's request that holds the open execution of the task."""


def instrument(app: Celery, perf: AgentPerf, *, not_failures: ExceptionTypes = ()) -> None:
    """Record every run of this app's tasks. See the docstring of the module.

    Call this function once, where the app is made. Each process of a worker then either runs this call or is forked
    from a process that ran it.

    Args:
        app: the app.
        perf: the server and namespace.
        not_failures: as for `MetricsCollector.track`: exceptions that count as success.

    Raises:
        InvalidArgument: for an invalid argument, and for an app that is instrumented already.
    """
    if isinstance(app, Proxy):  # such as celery.current_app
        app = app._get_current_object()  # noqa: SLF001  the public way to get the object behind the proxy
    if not isinstance(app, Celery):
        raise InvalidArgument("app", app, "a Celery app")
    checked_perf(perf)
    kept = exception_types("not_failures", not_failures)
    if app in _instrumented:
        raise InvalidArgument("app", app, "an app that is not instrumented yet")
    _instrumented[app] = _Tracking(app, perf, kept)


def leased(balancer: LoadBalancer, agent_type: str, **options: Unpack[LeaseOptions]) -> Callable[[F], F]:
    """Return a decorator that runs a task on a leased instance. Write it below the decorator of the task.

    If no instance is free, the task is sent again. It runs after `NoCapacity.retry_after` seconds, plus a random extra
    of up to a quarter of this time. This uses up none of the task's retries. The task can be sent again any number of
    times, unless it has `expires=`. A plain call and an eager call are not sent again: they raise NoCapacity.

    If the function has a parameter `lease`, it gets the `Lease`; callers of the task do not pass it. The outcome of the
    lease is as in `LoadBalancer.lease`, with two differences. SoftTimeLimitExceeded counts as "timeout".
    `task.retry()` without `exc=`, `Ignore` and `Reject` count neither for nor against the instance.

    Args:
        balancer: the balancer, such as ``perf.balancer()``. With ``on_unavailable="none"``, the task is also sent again
            if the server is unreachable.
        agent_type: the pool.
        options: as for `LoadBalancer.lease`. ``wait=`` occupies a slot of the worker while the task waits.

    Raises:
        InvalidArgument: for an invalid argument.
    """
    return cast("Callable[[F], F]", on_lease(balancer, agent_type, _put_off, _outcome_of, **options))


def _put_off(error: NoCapacity) -> Any:
    """Send the current task again, to run later."""
    task = current_task._get_current_object()  # noqa: SLF001  the public way to get the object behind the proxy
    request = None if task is None else task.request
    if request is None or request.called_directly or request.is_eager:
        raise error
    # `retry` increments `request.retries`. A task that waits for capacity has not failed, so its wait must not use up a
    # retry. Therefore `request.retries` is first lowered by one. To pass a higher `max_retries` instead would be wrong:
    # `retry` stores `max_retries` in the task, where it applies to all later retries in this process.
    retries = request.retries
    request.retries = retries - 1
    try:
        raise task.retry(exc=error, countdown=pause_s(error))
    finally:
        request.retries = retries


def _outcome_of(error: BaseException) -> Outcome | None:
    if isinstance(error, SoftTimeLimitExceeded):
        return Outcome.TIMEOUT
    is_said_of_the_task = isinstance(error, (Ignore, Reject)) or (isinstance(error, Retry) and error.exc is None)
    return Outcome.NEUTRAL if is_said_of_the_task else None


class _Tracking:
    """Records the tasks of an app.

    The pool process that runs a task gets the signals `task_prerun` and `task_postrun`. If this process is killed, the
    main process of the worker, which received the task, gets one of the other signals.
    """

    def __init__(self, app: Celery, perf: AgentPerf, not_failures: tuple[type[BaseException], ...]) -> None:
        self._app = weakref.ref(app)
        self._metrics = perf.metrics
        self._not_failures = not_failures
        self._receiver: int | None = None
        """Id of the process that receives tasks; None before the first task. Its forked children inherit the id."""
        self._runs_tasks = False
        """Whether the receiving process also runs tasks, as with the pools solo, threads and gevent."""
        self._received: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        for signal, handler in (
            (signals.task_prerun, self._begin),
            (signals.task_postrun, self._end),
            (signals.task_received, self._receive),
            (signals.task_failure, self._note_failure),
            (signals.task_retry, self._note_retry),
            (signals.task_revoked, self._note_revocation),
        ):
            # The handlers need no `try`: Celery catches and logs their exceptions. Without `dispatch_uid`, Celery
            # before 5.7 treats the same method of two objects as one handler, and connects only the method of the first
            # object.
            signal.connect(handler, weak=False, dispatch_uid=(__name__, id(self)))

    def _is_tracked(self, task: Any) -> bool:
        return task.app is self._app() and not task.name.startswith(_OWN_TASKS)

    def _is_receiver(self) -> bool:
        return self._receiver == os.getpid()

    def _begin(self, task: Any, **_: object) -> None:
        if self._is_tracked(task):
            self._runs_tasks = self._runs_tasks or (self._is_receiver() and not task.request.is_eager)
            span = self._metrics.track(_agent(task), not_failures=self._not_failures)
            span.__enter__()
            setattr(task.request, _SPAN, span)

    def _end(self, task: Any, state: str | None, retval: object, **_: object) -> None:
        span: Span | None = task.request.__dict__.pop(_SPAN, None)
        if span is None:
            return
        error = sys.exception() if state is None else _error_of(state, retval)
        if state is None and not isinstance(error, Exception):
            if process_end.is_child() and not (self._is_receiver() or task.request.is_eager):
                return  # this pool process ends, and the main process of the worker counts the execution
            error = CancelledError()  # the greenlet was killed, or the worker stops
        wrapped = getattr(error, "exc_cls_name", None)  # an attribute of Celery's wrapper for unpicklable exceptions
        if wrapped is not None:
            span.fail(arguments.nearest_name(wrapped))
            error = None
        span.__exit__(None if error is None else type(error), error, None)

    def _receive(self, request: Any, **_: object) -> None:
        if request.app is self._app():
            self._receiver = os.getpid()
            self._received[request.id] = request

    def _note_failure(self, sender: Any, task_id: str, exception: BaseException, **_: object) -> None:
        if isinstance(exception, (TimeLimitExceeded, WorkerLostError)):
            self._count_killed(sender, task_id, exception)

    def _note_retry(self, sender: Any, request: Any, reason: object = None, **_: object) -> None:
        # The worker itself retries some of the runs that it lost or cancelled. For a lost run, `reason.exc` is a
        # WorkerLostError. For a cancelled run, `reason` is None.
        cause = getattr(reason, "exc", None)
        if reason is None or isinstance(cause, WorkerLostError):
            self._count_killed(sender, request.id, cause)

    def _note_revocation(self, sender: Any, request: Any, terminated: bool, **_: object) -> None:
        if terminated:
            self._count_killed(sender, request.id, None)

    def _count_killed(self, task: Any, task_id: str, error: BaseException | None) -> None:
        """Record the execution of a killed process as a failure, or as a cancellation if `error` is None."""
        if not self._is_receiver() or self._runs_tasks or not self._is_tracked(task):
            return
        request = self._received.pop(task_id, None)
        if request is None or request.time_start is None:
            return
        seconds = max(0.0, time.time() - request.time_start)
        if error is None:
            self._metrics.record_cancellation(_agent(task), seconds)
        else:
            self._metrics.record_execution(_agent(task), seconds, False, type(error).__name__)


def _agent(task: Any) -> str:
    return arguments.nearest_name(task.name)


def _error_of(state: str, retval: object) -> BaseException | None:
    """Return the error of a task: None after success, a CancelledError if it was postponed, otherwise its exception."""
    if state == SUCCESS or not isinstance(retval, BaseException):
        return None
    if isinstance(retval, Retry):
        return CancelledError() if retval.exc is None or isinstance(retval.exc, NoCapacity) else retval.exc
    if isinstance(retval, Reject):
        reason = retval.reason if isinstance(retval.reason, Exception) else retval
        return CancelledError() if retval.requeue else reason
    return None if isinstance(retval, Ignore) else retval


_instrumented: weakref.WeakKeyDictionary[Celery, _Tracking] = weakref.WeakKeyDictionary()
