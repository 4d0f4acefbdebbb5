"""Random pauses. They have a generator of their own, since background threads draw from it.

A program that seeds `random` gets the same sequence whether these threads run or not, and processes that seed it alike
do not wait alike.
"""

from __future__ import annotations

import random

from agentperf_redis.background import register_for_fork


class _Generator(random.Random):
    def after_fork(self) -> None:
        """Seed the generator again in a forked child, which otherwise would draw the numbers of its parent."""
        self.seed()


_generator = _Generator()
register_for_fork(_generator)


def uniform(low: float, high: float) -> float:
    """Return a random number from `low` to `high`, all equally likely."""
    return _generator.uniform(low, high)
