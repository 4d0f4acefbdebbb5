"""The library's random numbers leave the sequence of `random` alone, and differ in forked children."""

from __future__ import annotations

import json
import os
import random

from agentperf_redis.random_numbers import bits, fraction, seed, uniform


def test_draws_leave_a_seeded_sequence_alone() -> None:
    state = random.getstate()
    try:
        random.seed(1)
        undisturbed = [random.random() for _ in range(3)]
        random.seed(1)
        mixed = []
        for _ in range(3):
            assert 2.0 <= uniform(2.0, 3.0) <= 3.0
            assert 0.0 <= fraction() < 1.0
            assert 0 <= bits(8) < 256
            mixed.append(random.random())
        assert mixed == undisturbed
    finally:
        random.setstate(state)


def test_forked_child_draws_its_own_numbers() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps([uniform(0.0, 1.0), fraction(), bits(64)]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        drawn = json.loads(pipe.read())
    own = [uniform(0.0, 1.0), fraction(), bits(64)]
    assert not set(drawn) & set(own)


def test_seed_begins_the_choices_again_and_leaves_the_pauses_alone() -> None:
    seed(5)
    first = [fraction(), bits(52)]
    seed(5)
    uniform(0.0, 1.0)
    assert [fraction(), bits(52)] == first
