from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from agentperf_redis.transport.places import Place, Places

COUNT = 3


class TimeLimit(Exception):
    """Raised out of a signal handler, as a task queue's soft time limit is."""


def ring(*_: object) -> None:
    raise TimeLimit


@pytest.fixture
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def taken(places: Places, count: int) -> list[Place]:
    found = [place for _ in range(count) if (place := places.take(0.0)) is not None]
    assert len(found) == count
    return found


def test_places_are_bounded() -> None:
    places = Places(COUNT)
    held = taken(places, COUNT)
    assert places.qsize() == 0
    assert places.take(0.01) is None
    places.give(held.pop())
    assert places.qsize() == 1
    assert places.take(0.0) is not None


def test_a_dropped_place_is_free_again() -> None:
    places = Places(COUNT)
    held = taken(places, COUNT)
    held.clear()
    assert places.qsize() == COUNT


def test_giving_a_place_twice_frees_one() -> None:
    places = Places(COUNT)
    one, *_others = taken(places, 2)
    places.give(one)
    places.give(one)
    assert places.qsize() == COUNT - 1


def test_waiters_get_the_places_that_are_given_back() -> None:
    places = Places(1)
    (held,) = taken(places, 1)
    got: list[Place | None] = []
    waiters = [threading.Thread(target=lambda: got.append(places.take(10.0))) for _ in range(4)]
    for waiter in waiters:
        waiter.start()
    places.give(held)
    del held
    deadline = time.monotonic() + 10
    while len(got) < len(waiters):
        assert time.monotonic() < deadline
        if got and (place := got[-1]) is not None:
            places.give(place)
        time.sleep(0.001)
    for waiter in waiters:
        waiter.join()
    assert None not in got


def test_threads_never_hold_more_places_than_there_are() -> None:
    places, most, held, lock = Places(COUNT), 0, 0, threading.Lock()

    def work() -> None:
        nonlocal most, held
        for _ in range(300):
            place = places.take(10.0)
            assert place is not None
            with lock:
                held += 1
                most = max(most, held)
            with lock:
                held -= 1
            places.give(place)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= COUNT
    assert places.qsize() == COUNT


@pytest.mark.usefixtures("alarm")
def test_interrupts_at_any_step_lose_no_place() -> None:
    places, interrupted, chance = Places(COUNT), 0, random.Random(1)
    while interrupted < 2000:
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00002, 0.0002))
            while True:
                place = places.take(1.0)
                assert place is not None
                places.give(place)
        except TimeLimit:
            interrupted += 1
            place = None
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert places.qsize() == COUNT


@pytest.mark.usefixtures("alarm")
def test_the_check_of_the_check_counts_lost_by_hand() -> None:
    """A count that a holder gives back in a `finally` loses places under the same interrupts."""
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
