"""One torture run: starts the server and the workers, injects faults, and checks what is left."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from agentperf_redis import AgentInstance, AgentPerf, keys
from agentperf_redis.alerts.notify import deliver_all
from agentperf_redis.balancer import PoolSettings
from tests.support.alert_rules import History, Receiver
from tests.support.pool_history import JUMPY
from tests.support.proxy import Proxy
from tests.support.servers import CLUSTERS, Raw, Server, ServerKind, wait_until
from tests.support.workers import Worker, Workers
from tests.torture import checks, journal
from tests.torture.trouble import Trouble
from tests.torture.work import DEADLINE_S, LEASE_TTL_S, POOL, Job, work

NAMESPACE = "torture"
PROCESSES, INSTANCES, CAPACITY = 4, 3, 2
SHARDS = 4
"""Number of shards of the pool and of the cache on a Cluster. On a single server, both have one shard."""
LEASE_S = 1.0
"""TTL of the lease under which a value is computed, s."""
_STORM_FAULTS, _CALM_S = 12, 1.0
"""Number of faults in a row, and duration of the calm time after these faults and their effects, s."""
_MUTANT_S = 4.0
"""Length of one run of a mutant, s."""
_RULES = """
[[alert]]
name = "failing"
agents = "moody"
when = "errors > 3"
window = "1m"
notify = ["ops"]

[notify.ops]
urls = ["{url}"]
"""
_HISTORY_MINUTES, _MOOD_MINUTES = 600, 10
"""Length of the history on which the alerts are evaluated, and length of each good or bad time in it, in minutes."""


@dataclass
class Report:
    """What happened in a run.

    Attributes:
        faults: number of injected faults of each kind.
        done: number of lines of each kind in the journals.
        grants: number of leases that the scripts granted.
        complaints: sentences that say what was wrong.
        folder: the folder of the journals; kept only if something was wrong.
    """

    faults: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    grants: int = 0
    complaints: list[str] = field(default_factory=list)
    folder: Path | None = None

    def remove_folder(self) -> None:
        """Remove the folder of the journals, unless something was wrong."""
        if self.folder is not None and not self.complaints:
            shutil.rmtree(self.folder)
            self.folder = None

    def lines(self) -> Iterator[str]:
        """Return the report in words."""
        yield f"{self.faults.total()} faults: " + ", ".join(f"{count} {kind}" for kind, count in self.faults.items())
        yield f"{self.grants} leases; " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.done.items()))
        yield from (f"WRONG  {each}" for each in self.complaints[:20])
        if len(self.complaints) > 20:
            yield f"and {len(self.complaints) - 20} more"
        if self.folder is not None:
            yield f"the journals are in {self.folder}"


class Torture:
    """A torture run on its own server.

    Args:
        kind: kind of the server.
        seconds: duration of the run in s, without its start and its end.
        seed: seed of all random choices. The processes race, so two runs with the same seed differ.
        mutant: name of a mutant; empty for none.
    """

    def __init__(self, kind: ServerKind, seconds: float, seed: int, mutant: str = "") -> None:
        self._kind, self._seconds, self._seed, self._mutant = kind, seconds, seed, mutant
        self._shards = SHARDS if kind in CLUSTERS else 1
        self._outages: list[tuple[float, float]] = []

    def run(self) -> Report:
        """Let the workers work under faults, let them end, and check everything."""
        with ExitStack() as stack:
            report = Report(folder=Path(tempfile.mkdtemp(prefix="agentperf-torture-")))
            stack.callback(report.remove_folder)
            assert report.folder is not None
            # With the default `appendfsync everysec`, the server delays writes to its file while a previous sync lasts.
            # If the server is killed during such a delay, it loses writes to which it has already replied.
            server = Server(self._kind, "--appendfsync", "no", aof=True)
            stack.callback(server.stop)
            proxy = None if server.clustered else Proxy(server.port)
            if proxy is not None:
                stack.callback(proxy.close)
            receiver = stack.enter_context(Receiver())
            workers = Workers()
            stack.callback(workers.close)
            job = self._prepare(server, proxy, receiver, report.folder)

            def start(number: int) -> Worker:
                return workers.start(work, job, number)

            crowd = dict(enumerate(workers.start_all(work, [(job, number) for number in range(PROCESSES)])))
            trouble = Trouble(server, proxy, crowd, start, self._seed)
            report.faults = trouble.happened
            until = time.monotonic() + self._seconds
            while time.monotonic() < until:
                begun = time.monotonic()
                for _ in range(_STORM_FAULTS):
                    trouble.strike()
                    time.sleep(0.1)
                trouble.end()
                self._outages.append((begun, time.monotonic() + DEADLINE_S + LEASE_S))
                if not self._mutant:
                    time.sleep(DEADLINE_S + LEASE_S + _CALM_S)
            self._finish(server, job, crowd, trouble, receiver, report)
            return report

    def _prepare(self, server: Server, proxy: Proxy | None, receiver: Receiver, folder: Path) -> Job:
        """Register the instances, write the history of the alerts, deploy the rule, and return the job of a worker."""
        with AgentPerf(server.url, namespace=NAMESPACE) as perf:
            # With the mutant "no capacity check", a script fails if an instance has the limit 0, for example while the
            # instance is ejected. Therefore all mutants run without ejection.
            balancer = perf.balancer(settings=PoolSettings(eject_after=None) if self._mutant else JUMPY)
            balancer.configure_pool(POOL, shards=self._shards)
            for number in range(INSTANCES):
                balancer.register_instance(
                    AgentInstance(f"i{number}", POOL, max_capacity=CAPACITY),
                    requests_per_minute=60_000 if number == 0 else math.inf,
                )
            history = History(perf.backend)
            for number, at in enumerate(history.minutes(_HISTORY_MINUTES, 1)):
                history.record("moody", at - 30, 0.1, failed=5 * (number // _MOOD_MINUTES % 2))
            history.count()
            perf.alerts.deploy(text=_RULES.format(url=receiver.url))
            start = history.now - 60 * _HISTORY_MINUTES
        url = server.url if proxy is None else proxy.url
        return Job(
            url, NAMESPACE, folder, folder / "stop", self._seed, self._mutant, self._shards, start, time.monotonic()
        )

    def _pools(self) -> list[keys.PoolKeys]:
        return [keys.pool(NAMESPACE, POOL, number, self._shards) for number in range(self._shards)]

    def _finish(
        self,
        server: Server,
        job: Job,
        crowd: dict[int, Worker],
        trouble: Trouble,
        receiver: Receiver,
        report: Report,
    ) -> None:
        """Let the workers end, and check everything."""
        job.stop.touch()
        for worker in crowd.values():
            worker.said()
            worker.answer()
        for worker in crowd.values():
            worker.result()
        lines = list(journal.lines(job.folder))
        report.done = Counter(line.kind for line in lines)
        complain = report.complaints.extend
        with server.client() as raw, AgentPerf(server.url, namespace=NAMESPACE) as perf:
            complain(self._units_that_stay_taken(perf, raw))
            histories = [raw.lrange(f"{pool.state}:log", 0, -1) for pool in self._pools()]
            (job.folder / "leases.json").write_text(json.dumps(histories, indent=0))  # kept if something is wrong
            report.grants = sum(entry.startswith("grant") for history in histories for entry in history)
            complain(checks.unsound_leases(histories, lines))
            agents = {f"agent-{line.worker}" for line in lines}
            stored = {agent: perf.metrics.get_or_create_metrics(agent).task_count for agent in agents}
            complain(checks.lost_or_doubled_counts(lines, stored, trouble.killed))
            self._deliver_everything(perf, raw)
            logged = [event.id for event in perf.alerts.log("failing", limit=5000)]
            complain(checks.lost_or_renamed_alerts(lines, logged, receiver.ids()))
        complain(checks.undocumented_errors(lines))
        complain(checks.stale_reads(lines))
        complain(checks.values_past_their_ttl(lines))
        complain(checks.double_computations(lines, LEASE_S, self._outages))

    def _units_that_stay_taken(self, perf: AgentPerf, raw: Raw) -> Iterator[str]:
        """Complain unless all capacity is free after all leases have expired and one operation has run."""

        def over() -> bool:
            seconds, micros = raw.time()
            entries = [due for pool in self._pools() for due in raw.zrange(pool.due, 0, -1, withscores=True)]
            return all(
                at <= seconds * 1000 + micros // 1000 for name, at in entries if name[0] == "@" or name[:2] == "W@"
            )

        wait_until(over, "the end of all leases and waits")
        balancer = perf.balancer()
        first = balancer.acquire(POOL, ttl=LEASE_TTL_S * 20)
        for number in range(INSTANCES):  # remove all limits below the capacity
            balancer.mark_healthy(POOL, f"i{number}")
            balancer.update_instance(POOL, f"i{number}", max_capacity=CAPACITY, requests_per_minute=math.inf)
        acquire = partial(balancer.acquire, POOL, ttl=LEASE_TTL_S * 20)
        got = [first, *(acquire() for _ in range(INSTANCES * CAPACITY - (first is not None)))]
        free = sum(each is not None for each in got)
        if free != INSTANCES * CAPACITY and not self._mutant:
            yield f"only {free} of {INSTANCES * CAPACITY} units are free at the end"

    def _deliver_everything(self, perf: AgentPerf, raw: Raw) -> None:
        """Deliver the waiting notifications, including those that a process was delivering when it was killed."""
        for outbox in raw.keys(f"{NAMESPACE}:*:outbox:*"):
            raw.zadd(outbox, dict.fromkeys(raw.zrange(outbox, 0, -1), 1.0))
        deliver_all(perf.alerts._service, 30.0)


def first_complaint(kind: ServerKind, mutant: str, within_s: float, seed: int) -> str:
    """Run a mutant, in short runs with different seeds, until a check fails.

    Returns:
        The first complaint; empty if no check failed within the time.
    """
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        report = Torture(kind, _MUTANT_S, seed, mutant).run()
        if report.complaints:
            assert report.folder is not None
            shutil.rmtree(report.folder)
            return report.complaints[0]
        seed += 1
    return ""
