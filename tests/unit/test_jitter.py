"""Random pauses leave the sequence of `random` alone, and differ in forked children."""

from __future__ import annotations

import os
import random

from agentperf_redis.jitter import uniform


def test_pauses_leave_a_seeded_sequence_alone() -> None:
    state = random.getstate()
    try:
        random.seed(1)
        undisturbed = [random.random() for _ in range(3)]
        random.seed(1)
        mixed = []
        for _ in range(3):
            assert 2.0 <= uniform(2.0, 3.0) <= 3.0
            mixed.append(random.random())
        assert mixed == undisturbed
    finally:
        random.setstate(state)


def test_forked_child_draws_its_own_numbers() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, repr(uniform(0.0, 1.0)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() != repr(uniform(0.0, 1.0))
