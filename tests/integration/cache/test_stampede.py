"""Many processes with many tasks want one missing value at once: it is computed once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, cached
from agentperf_redis.errors import ComputeFailed
from tests.servers import Raw, Server, wait_until
from tests.workers import Workers

PROCESSES, TASKS = 8, 50
LEASE_S = 1.5


def crowd(url: str, namespace: str, work_s: float, failing: bool) -> tuple[int, list[str], float]:
    """A worker process: fifty tasks call one decorated function; return its calls, what they got, and how long it took."""
    backend = Backend(url, namespace=namespace)
    calls: list[int] = []

    @cached(LRUCache(backend=backend))
    async def work(question: str) -> str:
        calls.append(1)
        await asyncio.sleep(work_s)
        if failing:
            raise ValueError(f"no answer to {question}")
        return f"{question} {os.getpid()}"

    async def one() -> str:
        try:
            return await work("why?")
        except (ValueError, ComputeFailed) as error:
            return str(error)

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one() for _ in range(TASKS)))

    begun = time.monotonic()
    with asyncio.Runner() as runner:
        got = runner.run(all_of_them())
        took = time.monotonic() - begun
        runner.run(backend.aclose())
    return len(calls), got, took


@pytest.mark.every_server
def test_one_call_serves_all(server: Server, namespace: str, workers: Workers) -> None:
    results = workers.run(crowd, [(server.url, namespace, 0.4, False)] * PROCESSES)

    assert sum(calls for calls, _, _ in results) == 1
    answers = {answer for _, got, _ in results for answer in got}
    assert len(answers) == 1
    assert [len(got) for _, got, _ in results] == [TASKS] * PROCESSES


@pytest.mark.every_server
def test_one_failing_call_is_an_error_for_all(server: Server, namespace: str, workers: Workers, raw: Raw) -> None:
    results = workers.run(crowd, [(server.url, namespace, 0.6, True)] * PROCESSES)

    assert sum(calls for calls, _, _ in results) == 1
    answers = {answer for _, got, _ in results for answer in got}
    assert len(answers) == 2, "the original error for one process, word of it for the others"
    assert all("no answer to why?" in answer for answer in answers)
    assert not list(raw.scan_iter(match=f"{namespace}*:e:*"))


def lead_for_ever(url: str, namespace: str) -> Iterator[str]:
    backend = Backend(url, namespace=namespace)

    @cached(LRUCache(backend=backend, lease=LEASE_S))
    def work(question: str) -> str:
        time.sleep(600)
        return question

    yield work.key("why?")
    work("why?")


def wait_for_leader(url: str, namespace: str, key: str) -> tuple[int, Any, float]:
    cache = LRUCache(backend=Backend(url, namespace=namespace), lease=LEASE_S)
    calls: list[int] = []

    async def work() -> int:
        calls.append(1)
        await asyncio.sleep(0.1)
        return os.getpid()

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(cache.aio.get_or_compute(key, work) for _ in range(TASKS)))

    got = asyncio.run(all_of_them())
    assert len(set(got)) == 1
    return len(calls), got[0], time.monotonic()


@pytest.mark.every_server
def test_a_killed_leader_costs_one_more_call_and_its_lease(
    server: Server, namespace: str, workers: Workers, raw: Raw
) -> None:
    leader = workers.start(lead_for_ever, server.url, namespace)
    key = leader.said()
    leader.answer()
    wait_until(lambda: raw.exists(f"{namespace}:{{cache:default}}:l:{key}"), "the leader's lease")
    waiting = [workers.start(wait_for_leader, server.url, namespace, key) for _ in range(PROCESSES - 1)]
    wait_until(lambda: raw.hexists(f"{namespace}:{{cache:default}}:l:{key}", "waited"), "others to wait")

    leader.kill()
    killed = time.monotonic()
    results = [worker.result() for worker in waiting]

    assert sum(calls for calls, _, _ in results) == 1, "with the leader's, two"
    assert len({value for _, value, _ in results}) == 1
    assert max(served for _, _, served in results) - killed < LEASE_S + 2
