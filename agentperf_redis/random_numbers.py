"""The library's own random numbers. They are independent of the module `random`, which belongs to the user's program.

A program that seeds `random` gets the same sequence from it whether the library draws numbers or not. If several
processes seed `random` equally, the library still draws different numbers in each process. So the processes wait for
different times, their values expire at different times, and they pick different instances.
"""

from __future__ import annotations

import random
from typing import Final

from agentperf_redis.background import register_for_fork


class _Generator(random.Random):
    def after_fork(self) -> None:
        """Seed the generator again in a forked child, which otherwise would draw the numbers of its parent."""
        self.seed()


_pauses: Final = _Generator()
"""For pauses of background threads. It is separate, so a seeded test always draws the same numbers for its calls."""
_choices: Final = _Generator()
register_for_fork(_pauses)
register_for_fork(_choices)

bits: Final = _choices.getrandbits
"""Return a random integer with the given number of bits, all equally likely. For the picks and choices of calls."""
fraction: Final = _choices.random
"""Return a random number, at least 0.0 and below 1.0, all equally likely. This is for the choices of calls."""
seed: Final = _choices.seed
"""Begin a reproducible sequence of `bits` and `fraction`, for tests."""


def uniform(low: float, high: float) -> float:
    """Return the random length of a pause. All lengths from `low` to `high` are equally likely."""
    return _pauses.uniform(low, high)
