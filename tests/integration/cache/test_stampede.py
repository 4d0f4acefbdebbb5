"""Many processes with many tasks request one missing value at once: it is computed once."""

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
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector, overlap, union
from tests.support.workers import Workers

PROCESSES, TASKS = 8, 50
LEASE_S = 1.5
PATIENT_S = 20.0
"""Deadline and lease TTL: so long that a busy machine does not look like a lost server or a crashed leader."""


def all_wait(cache: LRUCache, calls: list[int]) -> bool:
    """Return whether one task computes or waits for another process, and all other tasks wait for this task."""
    flights = list(cache._shared_state.flights._flights.values())
    return sum(len(flight.ended._callbacks) for flight in flights) == TASKS - 1 and bool(
        calls or cache._shared_state._waiting
    )


def crowd(url: str, namespace: str, waiting: str, failing: bool) -> tuple[int, list[str]]:
    """A worker process: fifty tasks call one decorated function.

    Returns how often the function ran, and the answers of the tasks. Each process writes a byte into the file `waiting`
    once all of its tasks wait. The function proceeds when all processes have written.
    """
    backend = Backend(url, namespace=namespace, deadline=PATIENT_S)
    cache = LRUCache(name="default", backend=backend, lease=PATIENT_S)
    calls: list[int] = []

    @cached(cache)
    async def work(question: str) -> str:
        calls.append(1)
        await asyncio.to_thread(wait_until, lambda: Path(waiting).stat().st_size >= PROCESSES, "all tasks to wait")
        if failing:
            raise ValueError(f"no answer to {question}")
        return f"{question} {os.getpid()}"

    async def one() -> str:
        try:
            return await work("why?")
        except (ValueError, ComputeFailed) as error:
            return str(error)

    async def all_of_them() -> list[str]:
        calling = [asyncio.create_task(one()) for _ in range(TASKS)]
        await asyncio.to_thread(wait_until, lambda: all_wait(cache, calls), "all tasks but one to wait for that one")
        written.write(b".")
        return await asyncio.gather(*calling)

    with Path(waiting).open("ab", buffering=0) as written, asyncio.Runner() as runner:
        got = runner.run(all_of_them())
        runner.run(backend.aclose())
    return len(calls), got


def test_one_call_computes_for_all_tasks(server: Server, namespace: str, workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "waiting").touch()
    results = workers.run(crowd, [(server.url, namespace, str(tmp_path / "waiting"), False)] * PROCESSES)

    assert sum(calls for calls, _ in results) == 1
    answers = {answer for _, got in results for answer in got}
    assert len(answers) == 1
    assert [len(got) for _, got in results] == [TASKS] * PROCESSES


@pytest.mark.thorough
def test_one_failing_call_raises_in_all_tasks(
    server: Server, namespace: str, workers: Workers, raw: Raw, tmp_path: Path
) -> None:
    (tmp_path / "waiting").touch()
    results = workers.run(crowd, [(server.url, namespace, str(tmp_path / "waiting"), True)] * PROCESSES)

    assert sum(calls for calls, _ in results) == 1
    answers = {answer for _, got in results for answer in got}
    assert len(answers) == 2, "the original error in one process, its report in the others"
    assert all("no answer to why?" in answer for answer in answers)
    assert not list(raw.scan_iter(match=f"{namespace}*:e:*"))


def request_until_done(url: str, namespace: str, calls: str, leads: bool) -> Iterator[Any]:
    """A worker process: fifty tasks request one key. In the process that leads, the function does not end.

    Yields three times: at the start, when all tasks wait, and at the end. The third yield has the pid, the values, the
    time when the values arrived, and the stalls of this process. Every call of the function writes a byte to `calls`.
    """
    cache = LRUCache(name="default", backend=Backend(url, namespace=namespace, deadline=PATIENT_S), lease=LEASE_S)
    own_calls: list[int] = []

    async def work() -> int:
        own_calls.append(1)
        written.write(b".")
        await asyncio.sleep(600 if leads else 0.1)
        return os.getpid()

    async def all_of_them() -> tuple[list[int], float]:
        return await asyncio.gather(*(cache.aio.get_or_compute("k", work) for _ in range(TASKS))), time.monotonic()

    with Path(calls).open("ab", buffering=0) as written, ThreadPoolExecutor(1) as thread:
        yield "is there"
        calling = thread.submit(asyncio.run, all_of_them())
        wait_until(lambda: all_wait(cache, own_calls), "all tasks but one to wait for that one")
        with StallDetector() as stalls:
            yield "all wait"
            values, at = calling.result()
        yield os.getpid(), values, at, stalls.spans


@pytest.mark.thorough
def test_killed_leader_costs_one_call_and_its_lease(
    server: Server, namespace: str, workers: Workers, tmp_path: Path, raw: Raw
) -> None:
    calls = tmp_path / "calls"
    leader, *waiting = (
        workers.start(request_until_done, server.url, namespace, str(calls), number == 0) for number in range(PROCESSES)
    )
    for each in (leader, *waiting):  # all processes run before the leader requests the key
        each.said()
    leader.answer()
    leader.said()
    for each in waiting:
        each.answer()
    for each in waiting:
        each.said()
    assert calls.read_bytes() == b".", "the leader's"

    with StallDetector(raw.ping) as server_stalls:
        leader.kill()
        killed = time.monotonic()
        for each in waiting:
            each.answer()
        served = [each.said() for each in waiting]

    assert calls.read_bytes() == b"..", "the leader's and one more"
    assert [len(values) for _, values, _, _ in served] == [TASKS] * (PROCESSES - 1)
    (second,) = {value for _, values, _, _ in served for value in values}
    spans = {pid: spans for pid, _, _, spans in served}
    for pid, _, at, _ in served:  # subtract stalls of the server, the computing process and the waiter
        stall_s = overlap(union(server_stalls.spans, spans[second], spans[pid]), killed, at)
        assert at - killed - stall_s < LEASE_S + 2
