"""A real program with many clients: the warning appears only if the program does not close its clients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.places import ROOT
from tests.support.servers import Server

PROGRAM = """
import gc, sys
from agentperf_redis import AgentPerf, LRUCache

kept = AgentPerf()
LRUCache(name="c").put("k", 1)
for number in range(int(sys.argv[1])):
    perf = AgentPerf()
    perf.cache("c", max_size=3).get("k")
    if sys.argv[2] == "close":
        perf.close()
perf = None
gc.collect()
kept.cache("c").get("k")
"""


@pytest.mark.thorough
@pytest.mark.parametrize(("clients", "ending", "warns"), [(30, "close", False), (1, "-", False), (30, "-", True)])
def test_client_per_request_warns_only_if_it_stays_open(
    server: Server, namespace: str, clients: int, ending: str, warns: bool
) -> None:
    env = {**os.environ, "AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(clients), ending],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ("10 clients" in done.stderr) is warns, done.stderr
    assert done.stderr.count("Warning:") == warns, done.stderr
