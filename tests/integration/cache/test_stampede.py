"""Many processes with many tasks want one missing value at once: it is computed once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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


def ask_until_served(url: str, namespace: str, calls: str, leads: bool) -> Iterator[Any]:
    """A worker process: fifty tasks ask for one key. If it leads, its one call of the function never ends.

    Says when all of its tasks wait, and then what they got, and when. Every call of the function is a byte in `calls`.
    """
    cache = LRUCache(backend=Backend(url, namespace=namespace), lease=LEASE_S)

    async def work() -> int:
        written.write(b".")
        await asyncio.sleep(600 if leads else 0.1)
        return os.getpid()

    async def all_of_them() -> tuple[list[int], float]:
        return await asyncio.gather(*(cache.aio.get_or_compute("k", work) for _ in range(TASKS))), time.monotonic()

    def waiting() -> int:
        flight = cache._binding.flights._flights.get("k")
        return 0 if flight is None else len(flight.ended._callbacks)

    with Path(calls).open("ab", buffering=0) as written, ThreadPoolExecutor(1) as thread:
        asking = thread.submit(asyncio.run, all_of_them())
        wait_until(lambda: waiting() == TASKS - 1, "all tasks but one to wait for that one")
        wait_until(
            lambda: Path(calls).stat().st_size if leads else cache._binding._waiting, "that one to compute, or to wait"
        )
        yield "all wait"
        yield asking.result()


@pytest.mark.every_server
def test_a_killed_leader_costs_one_more_call_and_its_lease(
    server: Server, namespace: str, workers: Workers, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    leader = workers.start(ask_until_served, server.url, namespace, str(calls), True)
    leader.said()
    waiting = [workers.start(ask_until_served, server.url, namespace, str(calls), False) for _ in range(PROCESSES - 1)]
    for each in waiting:
        each.said()
    assert calls.read_bytes() == b".", "the leader's"

    leader.kill()
    killed = time.monotonic()
    for each in waiting:
        each.answer()
    served = [each.said() for each in waiting]

    assert calls.read_bytes() == b"..", "the leader's and one more"
    assert len({value for values, _ in served for value in values}) == 1
    assert [len(values) for values, _ in served] == [TASKS] * (PROCESSES - 1)
    assert max(at for _, at in served) - killed < LEASE_S + 2
