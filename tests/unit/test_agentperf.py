"""Tests of `AgentPerf` without a server. The import test runs in a separate interpreter."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.agentperf import checked_perf
from agentperf_redis.errors import InvalidArgument

PROGRAM = """
import asyncio, sys, threading
from agentperf_redis import AgentPerf

services = ["agentperf_redis.balancer", "agentperf_redis.cache", "agentperf_redis.metrics"]
by_loop = []


class Watch:
    def find_spec(self, name, path=None, target=None):
        if threading.current_thread() is threading.main_thread():
            by_loop.append(name)


async def main():
    assert not any(name in sys.modules for name in services), "unused services are not loaded"
    sys.meta_path.insert(0, Watch())
    async with AgentPerf("redis://localhost:1") as perf:
        assert all(name in sys.modules for name in services)
        perf.balancer(), perf.cache("a"), perf.tiered_cache("b"), perf.metrics.track("c")
        from agentperf_redis import track_performance
    sys.meta_path.pop(0)
    assert not [name for name in by_loop if name.startswith("agentperf_redis.")], by_loop


asyncio.run(main())
"""


def test_async_enter_loads_services_off_the_loop() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [["l"], {}, 3, ""])
def test_invalid_cache_name_error_states_allowed_names(name: Any) -> None:
    with AgentPerf("redis://localhost:1") as perf:
        for make in (perf.cache, perf.tiered_cache):
            with pytest.raises(InvalidArgument, match=r"name is .* allowed: a string of 1 to 200"):
                make(name)


def test_argument_perf_is_checked() -> None:
    perf = AgentPerf("redis://localhost:1")
    assert checked_perf(perf) is perf
    with pytest.raises(InvalidArgument, match="perf is 1; allowed: an AgentPerf"):
        checked_perf(1)
