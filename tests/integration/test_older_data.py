"""If a server restarts with older data, for example from a backup, exactly the changes since the backup are lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.errors import LeaseLost
from tests.support.servers import Server, ServerKind


@pytest.mark.thorough
@pytest.mark.servers("valkey", "redis82")
def test_older_data_lose_what_came_later_and_nothing_else(
    start_server: Callable[..., Server], server_kind: ServerKind, namespace: str
) -> None:
    server = start_server(server_kind, "--appendfsync", "always", aof=True)
    files = server.nodes[0].folder / "appendonlydir"
    with AgentPerf(server.url, namespace=namespace, deadline=30) as perf:
        metrics, lb, cache = perf.metrics, perf.balancer(), perf.cache("answers", local_size=10)

        def record(count: int) -> None:
            for _ in range(count):
                metrics.record_execution("planner", 0.1, success=True)
            assert metrics.flush()

        lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=2))
        kept = lb.acquire("coder")
        record(3)
        cache.put("page", "old")
        shutil.copytree(files, files.with_name("backup"))

        lost = lb.acquire("coder")
        record(2)
        cache.put("page", "new")
        assert (cache.get("page"), lb.acquire("coder")) == ("new", None)
        server.kill()
        shutil.rmtree(files)
        files.with_name("backup").rename(files)
        server.restart()

        assert kept is not None
        assert lost is not None
        assert kept.lease is not None
        assert lost.lease is not None
        assert [each.token for each in lb.leases("coder").leases] == [kept.lease.token]
        successor = lb.acquire("coder")
        assert successor is not None
        assert lb.acquire("coder") is None, "the lease from before the copy still counts"
        assert successor.lease is not None
        assert successor.lease.fence > lost.lease.fence > kept.lease.fence
        with pytest.raises(LeaseLost):
            lost.lease.extend(60)
        assert lb.release(lost) is False, "the unit now belongs to the successor"
        assert (lb.release(kept), lb.release(successor)) == (True, True)

        assert metrics.snapshots()["planner"].task_count == 3
        record(1)
        assert metrics.snapshots()["planner"].task_count == 4
        assert cache.get("page") == "old", "the local copy of the lost value is dropped"
        cache.put("page", "newer")
        assert cache.get("page") == "newer"
