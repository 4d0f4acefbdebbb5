"""Tests of what the README says about loading the data files of one kind of server into another kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from tests.support.servers import CLUSTERS, Node, ServerFailed, ServerKind, program

LOADS: dict[ServerKind, tuple[ServerKind, ...]] = {
    "redis70": ("redis70", "redis82", "valkey"),
    "redis82": ("redis82",),
    "valkey": ("valkey",),
}
"""Kind of the server that wrote the data files -> kinds of the servers that load them."""
STANDALONE = [kind for kind in get_args(ServerKind) if kind not in CLUSTERS and program(kind)]


@pytest.fixture(params=["rdb", "aof"])
def written(request: pytest.FixtureRequest, server_kind: ServerKind) -> Iterator[Path]:
    """A data folder with data of all three services. Its server has ended."""
    node = Node(server_kind, aof=request.param == "aof")
    with AgentPerf(f"redis://127.0.0.1:{node.port}") as perf:
        lb = perf.balancer()
        lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=2))
        lb.release(lb.acquire("coder"))
        assert perf.cache("answers").put("a", [1, 2], tags=["letters"])
        assert perf.tiered_cache("docs").put("b", 2)
        perf.metrics.record_execution("planner", 0.1, success=True)
        assert perf.metrics.flush()
    if request.param == "rdb":
        with node.client() as client:
            client.save()
    node.kill()
    yield node.folder
    node.stop()


@pytest.mark.thorough
@pytest.mark.servers("valkey", "redis82", "redis70")
@pytest.mark.parametrize("reader", STANDALONE)
def test_server_loads_or_refuses_data_files(written: Path, server_kind: ServerKind, reader: ServerKind) -> None:
    aof = (written / "appendonlydir").exists()
    files = {path: path.read_bytes() for path in written.rglob("*") if path.is_file() and path.name != "log"}
    if reader not in LOADS[server_kind]:
        with pytest.raises(ServerFailed, match="exited at start"):
            Node(reader, "--dir", str(written), aof=aof)
        assert {path: path.read_bytes() for path in files} == files
        return
    node = Node(reader, "--dir", str(written), aof=aof)
    with AgentPerf(f"redis://127.0.0.1:{node.port}") as perf:
        assert perf.cache("answers").get("a") == [1, 2]
        assert perf.tiered_cache("docs").get("b") == 2
        assert perf.metrics.snapshots()["planner"].task_count == 1
        with perf.balancer().lease("coder") as lease:
            assert lease.instance.id == "coder-1"
    node.stop()
