"""The demo on a small tree, with real workers and a real server. The demo's checks must detect broken promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import redis

from agentperf_redis.backend import Backend
from agentperf_redis.demo import DemoOptions, PlainProgress, Report, Snapshot, Start, agents, run_demo
from agentperf_redis.demo.leftovers import let_expire
from agentperf_redis.demo.team import AGENTS
from agentperf_redis.demo.tree import Tree, find_tree
from agentperf_redis.demo.worker import conclude
from agentperf_redis.errors import BackendUnavailable
from tests.support.places import ROOT
from tests.support.servers import Raw, Server, wait_until
from tests.support.servers import gone as has_ended

FILES = 40


class Watcher:
    """A progress display that records everything, and calls `look` on each snapshot."""

    def __init__(self, look: Callable[[Start, Snapshot], None] | None = None) -> None:
        self.start: Start | None = None
        self.snapshots: list[Snapshot] = []
        self.events: list[str] = []
        self._look = look

    def begin(self, start: Start) -> None:
        self.start = start

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        if self._look is not None and self.start is not None:
            self._look(self.start, snapshot)

    def event(self, text: str) -> None:
        self.events.append(text)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def reviewed_here(tree: Tree) -> Any:
    """Return the result that the workers must report. It is computed here, without caches and balancer."""
    reviews = []
    for file in tree.files:
        source = (tree.root / file).read_bytes()
        outline = agents.read(source, tree.module_name(file), is_package=file.endswith("__init__.py"))
        libraries = {each.module: agents.public_names(each.module, tree.search) for each in outline.imports}
        reviews.append(agents.summarise(file, outline, agents.criticise(source), libraries))
    return json.loads(json.dumps(conclude(reviews)))


@pytest.mark.thorough
def test_demo_succeeds_although_a_worker_is_killed(server: Server, namespace: str, raw: Raw) -> None:
    watcher = Watcher()
    report = run_demo(DemoOptions(url=server.url, files=FILES, workers=3, namespace=namespace, lease_ttl=1.0), watcher)

    assert report.failures == []
    assert report.ok
    assert (report.files, report.workers, report.namespace) == (FILES, 3, namespace)
    expected = reviewed_here(find_tree(None, FILES))
    assert len(report.worst) == 10
    assert json.loads(report.to_json())["worst"] == expected["worst"]
    assert (report.lines, report.findings) == (expected["lines"], expected["findings"])
    # Two workers each reviewed all files. The third worker was killed after it had reviewed at least half of the files.
    assert report.casualty is not None
    assert report.casualty.files >= FILES // 2
    assert len(report.casualty.leases) >= 1
    assert report.casualty.recovered_after is not None
    steps = sum(report.instances.values())
    assert 4 * 2.5 * FILES <= steps < 4 * 3 * FILES
    assert {agent.agent_name for agent in report.agents} == set(AGENTS)
    assert all(agent.success_rate == 1.0 and agent.p99_execution_time > 0 for agent in report.agents)
    # Nearly every distinct result was computed only once. More results came from the caches than from computations.
    assert report.computed <= 1.05 * report.distinct
    assert report.served > report.computed
    assert all(cache.hits > 0 and cache.seconds_saved > 0 for cache in report.caches)
    # The server holds no lease of any agent.
    for agent in AGENTS:
        due = raw.zrange(f"{namespace}:{{lb:{agent}}}:due", 0, -1)
        assert not [member for member in due if member.startswith("@")]
    # The progress display shows the killed worker.
    assert watcher.start is not None
    assert watcher.start.kill
    assert any("killed worker 2" in event for event in watcher.events)
    assert {worker.state for worker in watcher.snapshots[-1].workers} == {"done", "killed"}
    assert all(gone(worker.pid) for worker in watcher.snapshots[-1].workers)
    text = "\n".join(report.to_lines())
    assert report.worst[0]["path"] in text
    assert "NOT" not in text


@pytest.mark.thorough
def test_victim_waits_for_the_kill_while_the_demo_stalls(server: Server, namespace: str) -> None:
    stalls: list[int] = []

    def stall(_: Start, snapshot: Snapshot) -> None:
        first, victim = snapshot.workers
        if victim.state == "working" and not stalls:
            stalls.append(victim.files)
            wait_until(lambda: has_ended(first.pid), "the other worker to end", 60)

    report = run_demo(
        DemoOptions(url=server.url, files=20, workers=2, namespace=namespace, lease_ttl=1.0), Watcher(stall)
    )

    assert stalls
    assert report.failures == []
    assert report.casualty is not None
    assert 10 <= report.casualty.files <= 15


@pytest.mark.thorough
def test_demo_without_url_runs_a_readable_private_server(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "pack/__init__.py", "pack/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import json, os\nfrom json import loads, _default_decoder\ndef f(a=[]): pass\n")
    seen: set[str] = set()

    def look(start: Start, snapshot: Snapshot) -> None:
        with redis.Redis(unix_socket_path=str(start.socket), decode_responses=True) as client:
            seen.update(client.scan_iter(f"{start.namespace}:*"))

    watcher = Watcher(look)
    report = run_demo(DemoOptions(path=tmp_path, workers=2, kill=False), watcher)

    assert report.failures == []
    assert report.casualty is None
    assert [review["path"] for review in report.worst] == ["a.py", "b.py", "pack/__init__.py", "pack/c.py"]
    assert ["private import", 1] in report.worst[0]["kinds"]
    assert "agentperf:{lb:reader}:state" in seen
    assert "agentperf:{cache:files}:meta" in seen
    assert "agentperf:{tiered:modules}:meta" in seen
    assert watcher.start is not None
    assert watcher.start.socket is not None
    assert str(watcher.start.socket) in watcher.start.look
    assert not watcher.start.socket.exists()


BROKEN = {
    "each computation was done at most": """
        import os
        from agentperf_redis.demo import team
        team.EDITION = str(os.getpid())  # so workers share no results
    """,
    "every worker's report is the same": """
        import os
        from agentperf_redis.demo import agents
        weigh = agents.summarise
        agents.summarise = lambda path, *rest: weigh(f"{path} {os.getpid()}", *rest)
    """,
    "every step is in the metrics": """
        from agentperf_redis.metrics.client import MetricsCollector
        MetricsCollector.record_execution = lambda *args: None
    """,
    "no lease is left": """
        import os
        from agentperf_redis.balancer.client import LoadBalancer
        from agentperf_redis.demo import journal, worker
        from agentperf_redis.metrics.client import MetricsCollector
        flush, kept = MetricsCollector.flush, []
        def leak(self):  # a worker calls flush last
            kept.append(LoadBalancer(backend=self._backend).acquire("critic", ttl=60.0))
            return flush(self)
        MetricsCollector.flush = leak
        worker.AgentPerf.__exit__ = lambda *error: None
        journal.Journal.close = lambda self: os._exit(0)
    """,
    "every worker that was not killed finished": """
        import os, sys
        from agentperf_redis.demo import team
        def fail(self, file):
            raise RuntimeError("the agents are on strike")
        team.Team.review = fail
    """,
}


@pytest.mark.thorough
@pytest.mark.parametrize("promise", BROKEN)
def test_check_detects_a_broken_promise(promise: str, server: Server, namespace: str, tmp_path: Path) -> None:
    """Each program in BROKEN breaks one promise, so the check of that promise must fail."""
    program = tmp_path / "worker.py"
    program.write_text(dedent(BROKEN[promise]) + "\nfrom agentperf_redis.demo import worker\nworker.main()\n")

    report = run_demo(
        DemoOptions(
            url=server.url, files=8, workers=2, kill=False, namespace=namespace, lease_ttl=1.0, program=(str(program),)
        ),
        Watcher(),
    )

    assert not report.ok
    assert any(failure.startswith(promise) for failure in report.failures), report.failures


@pytest.mark.thorough
def test_workers_end_after_their_demo_is_killed(server: Server, namespace: str, tmp_path: Path) -> None:
    program = f"""
from agentperf_redis.demo import DemoOptions, run_demo
class PrintPids:
    def begin(self, start): pass
    def event(self, text): pass
    def update(self, snapshot):
        if all(worker.state == "working" for worker in snapshot.workers):
            print(*(worker.pid for worker in snapshot.workers), flush=True)
run_demo(DemoOptions(url={server.url!r}, workers=2, namespace={namespace!r}), PrintPids())
"""
    library = str(ROOT)
    demo = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": library, "TMPDIR": str(tmp_path)},
    )
    assert demo.stdout is not None
    pids = [int(word) for word in demo.stdout.readline().split()]
    assert len(pids) == 2

    demo.send_signal(signal.SIGKILL)
    demo.wait()
    demo.stdout.close()

    wait_until(lambda: all(map(gone, pids)), "the workers to end")


@pytest.mark.thorough
def test_demo_keys_expire_after_a_day(
    server: Server, namespace: str, raw: Raw, backend: Backend, tmp_path: Path
) -> None:
    (tmp_path / "a.py").write_text("import os\n")
    report: Report = run_demo(DemoOptions(url=server.url, path=tmp_path, workers=1, namespace=namespace), Watcher())
    assert report.ok, report.failures
    persistent = [key for key in raw.scan_iter(f"{namespace}:*") if raw.ttl(key) == -1]
    assert persistent

    assert let_expire(backend) == len(persistent)

    assert not [key for key in raw.scan_iter(f"{namespace}:*") if raw.ttl(key) == -1]


class Interrupted(Watcher):
    def update(self, snapshot: Snapshot) -> None:
        if snapshot.steps:
            raise KeyboardInterrupt


@pytest.mark.thorough
def test_interrupted_demo_keys_expire_after_a_day(server: Server, raw: Raw) -> None:
    watcher = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoOptions(url=server.url, files=FILES, workers=2), watcher)

    assert watcher.start is not None
    left = list(raw.scan_iter(f"{watcher.start.namespace}:*"))
    assert f"{watcher.start.namespace}:{{lb:reader}}:state" in left
    assert not [key for key in left if raw.ttl(key) == -1]


def test_progress_begins_only_after_the_server_replies(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    watcher = Watcher()
    with pytest.raises(BackendUnavailable):
        run_demo(DemoOptions(url=f"redis://:wrong@127.0.0.1:{server.port}", path=tmp_path), watcher)
    assert (watcher.start, watcher.events) == (None, [])


@pytest.mark.thorough
def test_namespace_with_all_results_fails_the_demo(server: Server, namespace: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os\n")
    options = DemoOptions(url=server.url, path=tmp_path, workers=1, namespace=namespace)
    assert run_demo(options, Watcher()).ok
    (failure,) = run_demo(options, Watcher()).failures
    assert failure.startswith("each computation was done at most")
    assert "nothing was computed" in failure


@pytest.mark.thorough
def test_plain_progress_prints_one_line_per_event(tmp_path: Path) -> None:
    import io

    (tmp_path / "a.py").touch()
    text = io.StringIO()
    run_demo(DemoOptions(path=tmp_path, workers=1, kill=False), PlainProgress(text))
    first, second, third, *_ = text.getvalue().splitlines()
    assert first.startswith("1 workers review 1 files of")
    assert "redis-cli -s /" in second
    assert "files per worker:" in third
