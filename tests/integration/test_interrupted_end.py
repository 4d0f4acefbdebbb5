"""A process that ends is told to end once more while it closes its client. Nothing is lost.

A handler of SIGTERM often raises `SystemExit`, and supervisors often send SIGTERM again. So does a greenlet of gunicorn:
see `process_end.despite_exit`.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.script import Script
from tests.support.programs import LIMIT_S, Programs
from tests.support.proxy import Proxy, matches
from tests.support.servers import Server, wait_until

pytestmark = [
    pytest.mark.thorough,  # each program takes a second
    pytest.mark.servers("valkey"),  # the kind of server does not affect these tests
]

PROGRAM = """
    import os
    import signal
    import sys

    from agentperf_redis import AgentInstance, AgentPerf, presence
    from agentperf_redis.balancer import lease_keeper
    from agentperf_redis.cache import maintenance
    from agentperf_redis.metrics import flusher

    flusher.FLUSH_EVERY_S = maintenance.REPORT_AFTER_S = 30.0  # send nothing before the end
    # On a busy machine, the test may need a long time to send the signal.
    flusher.CLOSE_S = lease_keeper._CLOSE_S = maintenance._CLOSE_S = presence._LEAVE_S = 30.0

    def end(number, frame):
        os.write(1, b"told to end\\n")
        {closing}
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    perf = AgentPerf(deadline=30.0)
    perf.metrics.record_execution("worker", 0.1, True)
    perf.metrics.flush()
    assert len(perf.metrics.workers()) == 1  # from now on, the server lists this process
    perf.metrics.record_execution("worker", 0.1, True)
    balancer = perf.balancer()
    balancer.register_instance(AgentInstance("coder-1", "coder", max_capacity=2))
    instance = balancer.acquire("coder")
    lock = perf.lock("nightly", timeout=3600.0)
    lock.acquire()
    cache = perf.cache("answers", max_size=10)
    cache.put("a", 1)
    assert [cache.get("a") for _ in range(5)] == [1] * 5
    print("at the end", flush=True)
    {ending}
"""


@pytest.mark.parametrize(
    "script",
    ["metrics/flush", "balancer/release", "locks/release", "cache/report_reads", "namespace/leave"],
)
@pytest.mark.parametrize(
    ("ending", "closing"),
    [("pass", "pass"), ("perf.close()", "pass"), ("pass", "perf.close()")],
    ids=["at exit", "in close", "closed by the handler"],
)
def test_second_request_to_end_loses_nothing(
    programs: Programs,
    proxy: Proxy,
    server: Server,
    namespace: str,
    counted: Callable[[], int],
    script: str,
    ending: str,
    closing: str,
) -> None:
    programs.write("work.py", PROGRAM.format(ending=ending, closing=closing))
    held = proxy.hold(only=lambda call: matches(Script(script), call) and programs.said("at the end"), reset=False)
    program = programs.start("work", url=proxy.url)
    held.wait(LIMIT_S)
    program.send_signal(signal.SIGTERM)
    wait_until(lambda: programs.said("told to end"), "the program to handle the signal")
    if script == "metrics/flush":  # sent by another thread; the program waits for it, and sends the others again
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.3)
        held.deliver()
    assert program.wait(LIMIT_S) == 0, programs.log()
    assert programs.log().splitlines() == ["at the end", "told to end"]
    assert counted() == 2
    with AgentPerf(server.url, namespace=namespace) as perf:
        assert [instance.current_load for instance in perf.balancer().instances["coder"]] == [0]
        assert not perf.lock("nightly").locked()
        assert perf.cache("answers", max_size=10).stats().hits == 5
        assert perf.metrics.workers() == ()
