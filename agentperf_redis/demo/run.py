"""Run the demo: several workers review one source tree, one worker is killed, and every promise is checked."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import agentperf_redis
from agentperf_redis import arguments, embedded, keys
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.backend import Backend
from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.command import Command, Reply
from agentperf_redis.demo.checks import Evidence, checks
from agentperf_redis.demo.journal import Account
from agentperf_redis.demo.leftovers import let_expire
from agentperf_redis.demo.model_calls import NOTE
from agentperf_redis.demo.progress import Progress, Snapshot, Start, WorkerProgress, WorkerState
from agentperf_redis.demo.redis_cli import scan_command
from agentperf_redis.demo.report import Casualty, Report
from agentperf_redis.demo.team import AGENTS, Shares, caches
from agentperf_redis.demo.tree import Tree, find_tree
from agentperf_redis.demo.worker import Task
from agentperf_redis.errors import AgentPerfError, CorruptState, shown
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.transport.address import ServerKind

MAX_WORKERS = 64
_TICK_S = 0.05
_CHECK_EVERY_S = 0.25
_HUNTING_TICK_S = 0.003
"""Poll interval while the victim must be stopped during a lease. It is short: a lease lasts one step, some ms."""
MIN_FILES_TO_KILL_IN = 20
"""Minimum number of files for killing a worker. With fewer, the workers finish too soon after the half-way point."""
_TIMEOUT_S = 600.0
_TAIL_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Options of a demo.

    Attributes:
        url: the server; None starts a private server that ends with the demo.
        path: folder to review; None for the standard library of the running Python.
        files: maximum number of files, spread over the tree; None for all.
        workers: number of worker processes, 1 to 64.
        kill: whether the last worker is killed half-way through; only with two or more workers and at least
            `MIN_FILES_TO_KILL_IN` files.
        namespace: prefix of all keys. None means `agentperf` on a private server. On the server at `url`, None means a
            new namespace whose keys expire after a day.
        lease_ttl: TTL of a lease without renewal, s. The capacity that a dead worker leased stays occupied this long.
        llm: whether each step is also recorded as a model call, with tokens and cost; see `model_calls`.
        program: the arguments with which the Python interpreter is started as a worker.
    """

    url: str | None = None
    path: Path | None = None
    files: int | None = None
    workers: int = 4
    kill: bool = True
    namespace: str | None = None
    lease_ttl: float = 3.0
    llm: bool = False
    program: tuple[str, ...] = ("-m", "agentperf_redis.demo.worker")

    def __post_init__(self) -> None:
        arguments.count("workers", self.workers, maximum=MAX_WORKERS)
        if self.files is not None:
            arguments.count("files", self.files)
        if self.namespace is not None:
            keys.check_namespace("namespace", self.namespace)
        arguments.seconds("lease_ttl", self.lease_ttl, minimum=0.2, maximum=60.0)


def run_demo(options: DemoOptions, progress: Progress) -> Report:
    """Run the demo.

    Args:
        options: options of the demo.
        progress: display of the running demo.

    Returns:
        The report; `Report.ok` is true if every promise held.

    Raises:
        InvalidArgument: the folder does not exist or has no Python file.
        BackendUnavailable: the server is unreachable.
    """
    tree = find_tree(options.path, options.files)
    with contextlib.ExitStack() as stack:
        socket, url = None, options.url
        if url is None:
            server = stack.enter_context(embedded.private())
            socket, url = server.socket, server.url
        namespace = options.namespace or (
            "agentperf" if socket is not None else f"agentperf-demo-{secrets.token_hex(4)}"
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentperf-demo-")))
        perf = stack.enter_context(AgentPerf(url, namespace=namespace))
        demo = _Demo(options, progress, tree, perf, url, folder)
        demo.read_earlier_counts()
        if options.url is not None and options.namespace is None:
            stack.callback(_tidy, perf.backend)  # tidy up even after a failure
        progress.begin(
            Start(
                address=perf.backend.address.masked,
                socket=socket,
                look=_look(perf.backend, socket),
                namespace=namespace,
                root=tree.root,
                files=len(tree.files),
                workers=options.workers,
                kill=demo.kills,
            )
        )
        if options.llm:
            progress.event(f"each step is also recorded as a model call; {NOTE}")
        if options.kill and not demo.kills:
            progress.event(f"no worker is killed: that needs 2 workers and {MIN_FILES_TO_KILL_IN} files")
        return demo.run()


def _look(backend: Backend, private: Path | None) -> str:
    """Return the command that shows the keys. The backend must have reached the server."""
    socket = private
    if backend.address.kind is ServerKind.EMBEDDED:
        server = embedded.running(embedded.data_folder(backend.address.path or None))
        socket = None if server is None else server.socket
    return scan_command(backend.address, backend.primaries, socket, backend.namespace)


def _tidy(backend: Backend) -> None:
    with contextlib.suppress(AgentPerfError):  # an error here must not hide the error that ended the demo
        let_expire(backend)


@dataclass(slots=True)
class _Worker:
    """One worker process, as its parent process sees it."""

    number: int
    process: subprocess.Popen[bytes]
    account: Account
    log: Path
    stopped_at: float | None = None
    """When this worker was last stopped, s by the monotonic clock. It is always stopped just before it is killed."""
    killed_at: float | None = None
    held: dict[str, str] = field(default_factory=dict)
    """Leases that the worker held when it was killed: token -> agent type."""

    @property
    def state(self) -> WorkerState:
        if self.killed_at is not None:
            return "killed"
        # `returncode` is updated before the journal is read. So if the process has ended, the whole journal was read.
        code = self.process.returncode
        if code is None:
            return "working" if self.account.process else "starting"
        return "done" if code == 0 and self.account.result is not None else "failed"


class _Demo:
    def __init__(
        self, options: DemoOptions, progress: Progress, tree: Tree, perf: AgentPerf, url: str, folder: Path
    ) -> None:
        self._options = options
        self._progress = progress
        self._tree = tree
        self._perf = perf
        self._url = url
        self._folder = folder
        self._balancer = perf.balancer()
        self._recovered_at: float | None = None
        self._tried: Counter[str] = Counter()
        self._granted_before: dict[str, int] = {}
        self._recorded_before: dict[str, int] = {}
        self._calls_before: dict[str, int] = {}

    @property
    def kills(self) -> bool:
        """Whether a worker will be killed."""
        enough = self._options.workers > 1 and len(self._tree.files) >= MIN_FILES_TO_KILL_IN
        return self._options.kill and enough

    @property
    def _half(self) -> int:
        """Number of files after which the victim may be killed."""
        return len(self._tree.files) // 2

    @property
    def _last(self) -> int:
        """Number of files after which the victim waits for the kill.

        Without this wait, the victim could finish before the kill if the parent process stalls.
        """
        return self._half + len(self._tree.files) // 4

    def read_earlier_counts(self) -> None:
        """Contact the server and read the counts of earlier demos."""
        self._granted_before = {status.agent_type: status.granted for status in self._balancer.status(*AGENTS)}
        earlier = self._perf.metrics.snapshots(percentiles=False)
        self._recorded_before = {agent: each.task_count for agent, each in earlier.items()}
        self._calls_before = {agent: each.llm_calls for agent, each in earlier.items()}

    def run(self) -> Report:
        """Run the demo and check its promises."""
        for instance in Shares(self._options.workers).instances():
            self._balancer.register_instance(instance)
        began = time.monotonic()
        with self._workers() as workers:
            victim = workers[-1] if self.kills else None
            self._watch(workers, victim, began)
            seconds = time.monotonic() - began
            if victim is not None and victim.killed_at is not None:
                self._await_recovery(victim)
        left = self._leases()
        metrics = self._perf.metrics.snapshots()
        pools = self._balancer.status(*AGENTS)
        evidence = Evidence(
            accounts=[worker.account for worker in workers],
            failed=[self._failure(worker) for worker in workers if worker.state in ("failed", "working", "starting")],
            victim=victim.account if victim is not None else None,
            casualty=self._casualty(victim),
            left=sorted(left.values()),
            pools=pools,
            regained=self._fill(pools),
            granted={pool.agent_type: pool.granted - self._granted_before.get(pool.agent_type, 0) for pool in pools},
            tried=self._tried,
            recorded={agent: each.task_count - self._recorded_before.get(agent, 0) for agent, each in metrics.items()},
            calls={agent: each.llm_calls - self._calls_before.get(agent, 0) for agent, each in metrics.items()}
            if self._options.llm
            else None,
            killed_at=victim.stopped_at if victim is not None and victim.killed_at is not None else None,
        )
        return self._report(evidence, metrics, seconds)

    # ---- processes

    @contextlib.contextmanager
    def _workers(self) -> Iterator[list[_Worker]]:
        """Start the workers. All workers end when the block ends, even if it ends with an error."""
        workers: list[_Worker] = []
        try:
            for number in range(self._options.workers):
                workers.append(self._start(number))  # noqa: PERF401  if a start fails, the earlier workers must end
            yield workers
        finally:
            for worker in workers:
                if worker.process.poll() is None:
                    worker.process.kill()
                worker.process.wait()
                worker.account.update()

    def _start(self, number: int) -> _Worker:
        journal, log = self._folder / f"worker-{number}.journal", self._folder / f"worker-{number}.log"
        task = Task(
            url=self._url,
            namespace=self._perf.backend.namespace,
            number=number,
            parent=os.getpid(),
            root=str(self._tree.root),
            top=str(self._tree.top),
            files=list(self._tree.files),
            journal=str(journal),
            lease_ttl=self._options.lease_ttl,
            last=self._last if self.kills and number == self._options.workers - 1 else None,
            llm=self._options.llm,
        )
        library = str(Path(agentperf_redis.__file__).resolve().parent.parent)
        paths = [library, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", *self._options.program],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
            )
        with contextlib.suppress(BrokenPipeError):  # the worker exited at once; its log has the reason
            assert process.stdin is not None  # noqa: S101  stdin is PIPE
            process.stdin.write(task.to_json().encode())
            process.stdin.close()
        return _Worker(number, process, Account(journal), log)

    def _watch(self, workers: list[_Worker], victim: _Worker | None, began: float) -> None:
        """Wait until every worker has ended, and kill the victim half-way through."""
        half = self._half
        give_up_at = began + _TIMEOUT_S
        next_show = next_look = 0.0
        leases: dict[str, int] = {}
        while True:
            through = all([worker.process.poll() is not None for worker in workers])  # noqa: C419  poll every worker
            for worker in workers:
                worker.account.update()
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _CHECK_EVERY_S
                leases = dict(Counter(self._leases().values()))
                if victim is not None:
                    self._look_for_recovery(victim)
            if now >= next_show or through:
                next_show = now + _TICK_S
                self._progress.update(self._snapshot(workers, began, leases))
            if through or now > give_up_at:
                return
            hunting = victim is not None and victim.killed_at is None and victim.process.returncode is None
            if hunting and victim is not None and victim.account.files >= half:
                self._try_to_kill(victim)
            closing_in = hunting and victim is not None and victim.account.files >= half // 2
            time.sleep(_HUNTING_TICK_S if closing_in else _TICK_S)

    def _try_to_kill(self, victim: _Worker) -> None:
        """Stop the victim, so that it cannot release a lease. Kill it if it has a lease; otherwise let it continue."""
        victim.stopped_at = time.monotonic()
        victim.process.send_signal(signal.SIGSTOP)
        held = self._leases_of(victim)
        # A release may have been in flight when the victim was stopped. The server processes such a release before the
        # second read of the leases. So the victim holds exactly the leases that both reads found.
        held = {token: agent for token, agent in self._leases_of(victim).items() if token in held}
        if not held:
            victim.process.send_signal(signal.SIGCONT)
            return
        victim.process.kill()
        victim.process.wait()
        victim.killed_at = time.monotonic()
        victim.held = held
        victim.account.update()
        self._progress.event(
            f"killed worker {victim.number} (SIGKILL) after {victim.account.files} files, "
            f"while it held a lease on: {', '.join(sorted(held.values()))}"
        )

    # ---- state of the server

    def _leases(self) -> dict[str, str]:
        """Return all leases on the server: token -> agent type."""
        found: dict[str, str] = {}
        for agent in AGENTS:
            due = keys.pool(self._perf.backend.namespace, agent).due
            tokens = self._perf.backend.run(_lease_tokens(due))
            found.update(dict.fromkeys(tokens, agent))
        return found

    def _leases_of(self, worker: _Worker) -> dict[str, str]:
        process = worker.account.process
        return {token: agent for token, agent in self._leases().items() if process and process in token}

    def _look_for_recovery(self, victim: _Worker) -> bool:
        if victim.killed_at is None or self._recovered_at is not None:
            return self._recovered_at is not None
        if not set(victim.held) & set(self._leases()):
            self._recovered_at = time.monotonic()
            took = self._recovered_at - victim.killed_at
            self._progress.event(f"the killed worker's leases came back after {took:.1f} s")
        return self._recovered_at is not None

    def _await_recovery(self, victim: _Worker) -> None:
        """Wait until the killed worker's leases are gone.

        Expired leases of a pool are cleared by the next request to the pool, so this method makes requests.
        """
        give_up_at = time.monotonic() + 2 * self._options.lease_ttl + 2.0
        late = False
        while not self._look_for_recovery(victim) and not late:
            late = time.monotonic() > give_up_at  # if late, the loop looks one last time, then ends
            for agent in set(victim.held.values()):
                self._try_capacity(agent)
            time.sleep(_TICK_S)

    def _try_capacity(self, agent: str) -> None:
        instance = self._balancer.acquire(agent)
        if instance is not None:
            self._tried[agent] += 1
            self._balancer.release(instance, outcome="neutral")

    def _fill(self, pools: list[PoolStatus]) -> dict[str, int]:
        """Lease all capacity and release it. Capacity that cannot be leased was never released by its holder."""
        regained = {}
        for pool in pools:
            leased = []
            for _ in range(pool.total_capacity):
                instance = self._balancer.acquire(pool.agent_type)
                if instance is None:
                    break
                leased.append(instance)
            for instance in leased:
                self._balancer.release(instance, outcome="neutral")
            regained[pool.agent_type] = len(leased)
        return regained

    # ---- results

    def _snapshot(self, workers: list[_Worker], began: float, leases: dict[str, int]) -> Snapshot:
        accounts = [worker.account for worker in workers]
        computed = sum(account.began.total() for account in accounts)
        return Snapshot(
            elapsed=time.monotonic() - began,
            files=len(self._tree.files),
            workers=tuple(
                WorkerProgress(worker.number, worker.process.pid, worker.account.files, worker.state)
                for worker in workers
            ),
            steps=sum(len(account.steps) for account in accounts),
            computed=computed,
            served=max(0, sum(account.used.total() for account in accounts) - computed),
            leases=leases,
        )

    def _casualty(self, victim: _Worker | None) -> Casualty | None:
        if victim is None or victim.killed_at is None:
            return None
        recovered = None if self._recovered_at is None else self._recovered_at - victim.killed_at
        return Casualty(victim.number, victim.account.files, tuple(sorted(victim.held.values())), recovered)

    def _failure(self, worker: _Worker) -> str:
        end = worker.log.read_text(errors="replace")[-_TAIL_CHARACTERS:].strip() if worker.log.exists() else ""
        return f"worker {worker.number} ended with exit code {worker.process.returncode}: {end or 'its log is empty'}"

    def _report(self, evidence: Evidence, metrics: dict[str, PerformanceMetrics], seconds: float) -> Report:
        results = [account.result for account in evidence.accounts if account.result is not None]
        first: dict[str, Any] = results[0] if results else {"lines": 0, "findings": 0, "worst": []}
        return Report(
            root=str(self._tree.root),
            files=len(self._tree.files),
            lines=first["lines"],
            findings=first["findings"],
            worst=tuple(first["worst"]),
            seconds=seconds,
            workers=self._options.workers,
            casualty=evidence.casualty,
            agents=tuple(metrics[agent] for agent in AGENTS if agent in metrics),
            caches=tuple(cache.stats() for cache in caches(self._perf, self._tree)),
            pools=tuple(evidence.pools),
            instances=dict(sum((account.instances for account in evidence.accounts), Counter[str]())),
            computed=evidence.computed,
            distinct=evidence.distinct,
            served=evidence.served,
            checks=checks(evidence),
            namespace=self._perf.backend.namespace,
            llm=self._options.llm,
        )


def _lease_tokens(due: str) -> Command[list[str]]:
    """Read the lease tokens of a pool: those members of the pool's timers (`due`) that begin with @."""

    def decode(reply: Reply) -> list[str]:
        if not isinstance(reply, list) or not all(isinstance(name, bytes) for name in reply):
            raise CorruptState(due, f"an unexpected reply {shown(reply)}")
        return [name.decode(errors="replace") for name in reply if name.startswith(b"@")]

    return Command("ZRANGE", (due,), (0, -1), decode)
