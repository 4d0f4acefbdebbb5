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
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector, overlap, union
from tests.support.workers import Workers

PROCESSES, TASKS = 8, 50
LEASE_S = 1.5
PATIENT_S = 20.0
"""A deadline, and a lease, where a busy machine must not look like a server that is away or a leader that is dead."""


def all_wait(cache: LRUCache, calls: list[int]) -> bool:
    """Whether all of this process's tasks but one wait for that one, which computes, or waits for another process."""
    flights = list(cache._shared_state.flights._flights.values())
    return sum(len(flight.ended._callbacks) for flight in flights) == TASKS - 1 and bool(
        calls or cache._shared_state._waiting
    )


def crowd(url: str, namespace: str, waiting: str, failing: bool) -> tuple[int, list[str]]:
    """A worker process: fifty tasks call one decorated function; return its calls, and what they got.

    Each process writes a byte into the file `waiting` once all of its tasks wait; then only a call goes on.
    """
    backend = Backend(url, namespace=namespace, deadline=PATIENT_S)
    cache = LRUCache(backend=backend, lease=PATIENT_S)
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
        asking = [asyncio.create_task(one()) for _ in range(TASKS)]
        await asyncio.to_thread(wait_until, lambda: all_wait(cache, calls), "all tasks but one to wait for that one")
        written.write(b".")
        return await asyncio.gather(*asking)

    with Path(waiting).open("ab", buffering=0) as written, asyncio.Runner() as runner:
        got = runner.run(all_of_them())
        runner.run(backend.aclose())
    return len(calls), got


def test_one_call_serves_all(server: Server, namespace: str, workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "waiting").touch()
    results = workers.run(crowd, [(server.url, namespace, str(tmp_path / "waiting"), False)] * PROCESSES)

    assert sum(calls for calls, _ in results) == 1
    answers = {answer for _, got in results for answer in got}
    assert len(answers) == 1
    assert [len(got) for _, got in results] == [TASKS] * PROCESSES


@pytest.mark.thorough
def test_one_failing_call_is_an_error_for_all(
    server: Server, namespace: str, workers: Workers, raw: Raw, tmp_path: Path
) -> None:
    (tmp_path / "waiting").touch()
    results = workers.run(crowd, [(server.url, namespace, str(tmp_path / "waiting"), True)] * PROCESSES)

    assert sum(calls for calls, _ in results) == 1
    answers = {answer for _, got in results for answer in got}
    assert len(answers) == 2, "the original error for one process, word of it for the others"
    assert all("no answer to why?" in answer for answer in answers)
    assert not list(raw.scan_iter(match=f"{namespace}*:e:*"))


def ask_until_served(url: str, namespace: str, calls: str, leads: bool) -> Iterator[Any]:
    """A worker process: fifty tasks ask for one key. If it leads, its one call of the function never ends.

    Says that it is there, that all of its tasks wait, and at last what they got, when, and when the machine held this
    process up. Every call of the function is a byte in `calls`.
    """
    cache = LRUCache(backend=Backend(url, namespace=namespace, deadline=PATIENT_S), lease=LEASE_S)
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
        asking = thread.submit(asyncio.run, all_of_them())
        wait_until(lambda: all_wait(cache, own_calls), "all tasks but one to wait for that one")
        with StallDetector() as stalls:
            yield "all wait"
            values, at = asking.result()
        yield os.getpid(), values, at, stalls.spans


@pytest.mark.thorough
def test_a_killed_leader_costs_one_more_call_and_its_lease(
    server: Server, namespace: str, workers: Workers, tmp_path: Path, raw: Raw
) -> None:
    calls = tmp_path / "calls"
    leader, *waiting = (
        workers.start(ask_until_served, server.url, namespace, str(calls), number == 0) for number in range(PROCESSES)
    )
    for each in (leader, *waiting):  # so that none is kept from what it does by the starting of others
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
    for pid, _, at, _ in served:  # what held up the server, the one who computed, or the waiter itself is no one's wait
        stall_s = overlap(union(server_stalls.spans, spans[second], spans[pid]), killed, at)
        assert at - killed - stall_s < LEASE_S + 2
