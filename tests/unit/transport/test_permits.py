from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from agentperf_redis.transport.permits import Permit, Permits

COUNT = 3


class TimeLimit(Exception):
    """Raised by a signal handler, like the soft time limit of a task queue."""


def ring(*_: object) -> None:
    raise TimeLimit


@pytest.fixture
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def acquired(permits: Permits, count: int) -> list[Permit]:
    found = [permit for _ in range(count) if (permit := permits.acquire(0.0)) is not None]
    assert len(found) == count
    return found


def test_number_of_permits_is_bounded() -> None:
    permits = Permits(COUNT)
    held = acquired(permits, COUNT)
    assert permits.qsize() == 0
    assert permits.acquire(0.01) is None
    permits.release(held.pop())
    assert permits.qsize() == 1
    assert permits.acquire(0.0) is not None


def test_dropped_permit_becomes_free_again() -> None:
    permits = Permits(COUNT)
    held = acquired(permits, COUNT)
    held.clear()
    assert permits.qsize() == COUNT


def test_releasing_a_permit_twice_frees_one() -> None:
    permits = Permits(COUNT)
    one, *_others = acquired(permits, 2)
    permits.release(one)
    permits.release(one)
    assert permits.qsize() == COUNT - 1


def test_waiters_get_the_released_permits() -> None:
    permits = Permits(1)
    (held,) = acquired(permits, 1)
    got: list[Permit | None] = []
    waiters = [threading.Thread(target=lambda: got.append(permits.acquire(10.0))) for _ in range(4)]
    for waiter in waiters:
        waiter.start()
    permits.release(held)
    del held
    deadline = time.monotonic() + 10
    while len(got) < len(waiters):
        assert time.monotonic() < deadline
        if got and (permit := got[-1]) is not None:
            permits.release(permit)
        time.sleep(0.001)
    for waiter in waiters:
        waiter.join()
    assert None not in got


def test_threads_never_hold_too_many_permits() -> None:
    permits, maximum, held, lock = Permits(COUNT), 0, 0, threading.Lock()

    def work() -> None:
        nonlocal maximum, held
        for _ in range(300):
            permit = permits.acquire(10.0)
            assert permit is not None
            with lock:
                held += 1
                maximum = max(maximum, held)
            with lock:
                held -= 1
            permits.release(permit)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= maximum <= COUNT
    assert permits.qsize() == COUNT


@pytest.mark.usefixtures("alarm")
def test_interrupts_at_any_step_lose_no_permit() -> None:
    permits, interrupted, chance = Permits(COUNT), 0, random.Random(1)
    while interrupted < 2000:
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00002, 0.0002))
            while True:
                permit = permits.acquire(1.0)
                assert permit is not None
                permits.release(permit)
        except TimeLimit:
            interrupted += 1
            permit = None
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert permits.qsize() == COUNT


@pytest.mark.thorough
@pytest.mark.usefixtures("alarm")
def test_interrupts_do_lose_manually_counted_permits() -> None:
    """The control experiment: under the same interrupts, a counter that is restored in a `finally` loses permits."""
    free, interrupted, chance = [None] * 100_000, 0, random.Random(1)
    deadline = time.monotonic() + 30
    while len(free) == 100_000 and time.monotonic() < deadline:
        with contextlib.suppress(TimeLimit):
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00002, 0.0002))
            while True:
                held = False
                try:
                    free.pop()
                    held = True
                finally:
                    if held:
                        free.append(None)
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(free) < 100_000


def test_every_released_permit_wakes_a_waiter(monkeypatch: pytest.MonkeyPatch) -> None:
    """If two permits are released before a waiter runs, only one waiter is woken. This waiter wakes the other."""
    monkeypatch.setattr("agentperf_redis.transport.permits._POLL_S", 30.0)
    permits = Permits(2)
    held = acquired(permits, 2)
    got: SimpleQueue[Permit | None] = SimpleQueue()
    waiters = [threading.Thread(target=lambda: got.put(permits.acquire(60.0)), daemon=True) for _ in range(2)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)  # usually, both waiters wait now; a waiter that starts later finds a free permit
    for permit in held:
        permits.release(permit)
    del held[:], permit
    assert all(got.get(timeout=20.0) is not None for _ in waiters)
