"""The workers of a namespace, and the executions that run in them: `MetricsCollector.workers` and `running`.

Both come from the heartbeats of the workers; see `agentperf_redis.presence`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from agentperf_redis import arguments, keys
from agentperf_redis.command import Batch, Command, Flow, Reply, whole_number
from agentperf_redis.errors import CorruptState
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.presence import ALIVE_S, FORGET_S
from agentperf_redis.script import Script
from agentperf_redis.windows import LAST_MS, local_timestamp

_WORKERS = Script("namespace/workers")
_READ_AT_ONCE = 500
"""Number of workers that are read in one batch. If each has the maximum number of executions, the batch takes 2 MB."""


@dataclass(frozen=True, slots=True)
class RunningExecution:
    """A tracked execution that had run for at least a second, and had not ended, at the last heartbeat of its worker.

    Attributes:
        agent: the agent.
        host: host of its process.
        pid: its process.
        started: when it began, in local time.
        age: seconds since it began, by the server's clock.
        alive: whether its worker is alive; see `WorkerInfo`. If not, the process has ended, and the execution with it,
            or the process hangs.
    """

    agent: str
    host: str
    pid: int
    started: datetime
    age: float
    alive: bool


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker: one `AgentPerf` client of a process, once it has begun or recorded an execution or leased an instance.

    The figures are those of its last heartbeat. A worker sends a heartbeat at least every five seconds.

    Attributes:
        host: host of the process.
        pid: the process.
        since: when it first began or recorded an execution or leased an instance, in local time.
        last_seen: when its last heartbeat arrived, in local time.
        heartbeat_age: seconds since the last heartbeat arrived, by the server's clock.
        alive: whether the last heartbeat is at most 12 s old. Otherwise the process was killed, is stopped or cannot
            reach the server. A worker is forgotten 25 s after its last heartbeat. A closed worker is forgotten at once.
        leases_held: number of leases that it holds.
        pending: executions that wait because the last flush failed; 0 if that flush succeeded.
        dropped: executions that were dropped and never counted.
        error: error of the last flush; None if it succeeded.
        running: the oldest executions that have run for at least a second; at most 50, the oldest first.
        running_more: number of executions that have run for at least a second but are not in `running`.
        python: version of Python.
        version: version of this library.
    """

    host: str
    pid: int
    since: datetime
    last_seen: datetime
    heartbeat_age: float
    alive: bool
    leases_held: int
    pending: int
    dropped: int
    error: str | None
    running: tuple[RunningExecution, ...]
    running_more: int
    python: str
    version: str


@dataclass(frozen=True, slots=True)
class _Listed:
    """The workers that sent a heartbeat lately.

    Attributes:
        now_ms: the server's time, ms since 1970.
        seen_ms: for each worker, when its last heartbeat arrived, ms since 1970.
    """

    now_ms: int
    seen_ms: dict[str, int]


def workers(flusher: Flusher) -> Flow[tuple[WorkerInfo, ...]]:
    """Read all workers, sorted by host, process and age. If this process is a worker, it first sends a heartbeat."""
    yield from flusher.presence.refreshed()
    namespace = flusher.backend.namespace
    listed = yield from _list(namespace)
    names = list(listed.seen_ms)
    found: list[WorkerInfo] = []
    for first in range(0, len(names), _READ_AT_ONCE):
        reads = tuple(_read(namespace, name, listed) for name in names[first : first + _READ_AT_ONCE])
        infos: list[WorkerInfo | None] = yield from Batch(reads)
        found += [info for info in infos if info is not None]
    return tuple(sorted(found, key=lambda info: (info.host, info.pid, info.since)))


def running(flusher: Flusher, agent: str | None = None) -> Flow[tuple[RunningExecution, ...]]:
    """Read the running executions of one agent or of all, the oldest first."""
    return _running(flusher, None if agent is None else arguments.name("agent", agent))


def _running(flusher: Flusher, agent: str | None) -> Flow[tuple[RunningExecution, ...]]:
    infos = yield from workers(flusher)
    found = [each for info in infos for each in info.running if agent in (None, each.agent)]
    return tuple(sorted(found, key=lambda each: each.started))


def _list(namespace: str) -> Command[_Listed]:
    seen = keys.workers_seen(namespace)
    return Command(_WORKERS, (seen,), {"keep_ms": round(FORGET_S * 1000)}, lambda reply: _decode_list(seen, reply))


def _decode_list(key: str, reply: Reply) -> _Listed:
    try:
        status, now_ms, *pairs = reply
        if status == 1:
            seen = zip(pairs[::2], pairs[1::2], strict=True)
            return _Listed(now_ms, {name.decode(): whole_number(ms) for name, ms in seen})
    except (AttributeError, TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}")


def _read(namespace: str, name: str, listed: _Listed) -> Command[WorkerInfo | None]:
    key = keys.worker(namespace, name)
    return Command("HGETALL", (key,), (), lambda reply: _decode(key, reply, listed.now_ms, listed.seen_ms[name]))


def _decode(key: str, reply: Reply, now_ms: int, seen_ms: int) -> WorkerInfo | None:
    """Decode the record of a worker. Return None if the worker left after the list was read."""
    try:
        fields = {name.decode(): value.decode() for name, value in zip(reply[::2], reply[1::2], strict=True)}
        if not fields:
            return None
        heartbeat_age = max(0, now_ms - seen_ms) / 1000
        info = WorkerInfo(
            host=fields["host"],
            pid=whole_number(fields["pid"]),
            since=_time(fields["since_ms"]),
            last_seen=local_timestamp(seen_ms),
            heartbeat_age=heartbeat_age,
            alive=heartbeat_age <= ALIVE_S,
            leases_held=whole_number(fields["leases"]),
            pending=whole_number(fields["pending"]),
            dropped=whole_number(fields["dropped"]),
            error=fields["error"] or None,
            running=(),
            running_more=whole_number(fields["more"]),
            python=fields["python"],
            version=fields["version"],
        )
        words = fields["running"].split()
        pairs = list(zip(words[::2], words[1::2], strict=True))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, OSError):
        raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}") from None
    return replace(info, running=tuple(_execution(key, info, now_ms, *pair) for pair in pairs))


def _execution(key: str, info: WorkerInfo, now_ms: int, agent: str, started_ms: str) -> RunningExecution:
    try:
        started = _time(started_ms)
    except (ValueError, OverflowError, OSError):
        raise CorruptState(key, f"a running execution with the time {started_ms[:40]!r}") from None
    age = max(0, now_ms - whole_number(started_ms)) / 1000
    return RunningExecution(keys.decoded(agent), info.host, info.pid, started, age, info.alive)


def _time(ms: str) -> datetime:
    """Decode a stored time. Raise ValueError for a time after the year 9999."""
    number = whole_number(ms)
    if number > LAST_MS:
        raise ValueError("a time after the year 9999")
    return local_timestamp(number)
