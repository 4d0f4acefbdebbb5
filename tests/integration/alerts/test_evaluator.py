"""Continual evaluation on a thread or in a task. It goes on after an outage."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.alerts.model import AlertState
from tests.support.alert_rules import Receiver
from tests.support.proxy import Proxy
from tests.support.servers import Server, wait_until

POOL = """
[[alert]]
name = "load"
pool = "coder"
when = "healthy >= 1"
notify = ["ops"]
[notify.ops]
urls = ["{url}"]
"""


def fill(perf: AgentPerf) -> None:
    perf.balancer().register_instance(AgentInstance("c1", "coder"))


@pytest.mark.thorough
def test_thread_evaluates_and_notifies_until_stopped(perf: AgentPerf) -> None:
    with Receiver() as receiver:
        perf.alerts.deploy(text=POOL.format(url=receiver.url))
        fill(perf)
        with perf.alerts.run() as evaluator:
            wait_until(lambda: receiver.posted, "a notification")
            assert evaluator.running
        assert not evaluator.running
        assert repr(evaluator) == "Evaluator(stopped)"
    assert receiver.titles() == ["FIRING: load, coder"]


def test_task_evaluates_until_cancelled(server: Server, namespace: str) -> None:
    async def run() -> None:
        async with AgentPerf(server.url, namespace=namespace) as perf:
            await asyncio.to_thread(fill, perf)
            await perf.alerts.aio.deploy(text=POOL.format(url="json://127.0.0.1:9").replace('["ops"]', "[]"))
            task = asyncio.create_task(perf.alerts.aio.run())
            until = time.monotonic() + 60
            while not (await perf.alerts.aio.log()) and time.monotonic() < until:
                await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            (event,) = await perf.alerts.aio.log()
            assert event.after is AlertState.FIRING

    asyncio.run(run())


@pytest.mark.thorough
@pytest.mark.standalone
def test_outage_is_reported_once_and_changes_no_state(
    server: Server, namespace: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        AgentPerf(server.url, namespace=namespace) as direct,
        AgentPerf(proxy.url, namespace=namespace, deadline=0.2) as perf,
    ):
        direct.alerts.deploy(text=POOL.format(url="json://127.0.0.1:9").replace('["ops"]', "[]"))
        fill(direct)
        with caplog.at_level(logging.WARNING, logger="agentperf_redis"), perf.alerts.run():
            wait_until(direct.alerts.log, "the first firing")
            proxy.close_port()
            proxy.cut()
            wait_until(lambda: "alerts wait for the server" in caplog.text, "the warning")
            time.sleep(2.5)  # two more rounds: the evaluator retries each second
            proxy.open_port()
            wait_until(lambda: "alerts are evaluated again" in caplog.text, "the end of the outage")
        assert caplog.text.count("alerts wait for the server") == 1
        assert [event.after for event in direct.alerts.log()] == [AlertState.FIRING]
