"""The Python blocks of the README."""

from __future__ import annotations

import re

from tests.support.places import README

BLOCKS: list[str] = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
RECIPES = [block for block in BLOCKS if "agentperf_redis.integrations" in block]
"""Parts of a user's program for another framework. The tests of the framework run them."""
USERS_TESTS = [block for block in BLOCKS if "def test_" in block]
"""Tests as users write them. tests/integration/test_testing.py runs them."""
PROGRAMS = [block for block in BLOCKS if block not in RECIPES + USERS_TESTS]


def recipe(adapter: str) -> str:
    """Return the README's recipe for an adapter, such as "celery"."""
    found = [block for block in RECIPES if re.search(rf"agentperf_redis\.integrations\.{adapter}\b", block)]
    if len(found) != 1:
        raise LookupError(f"the README has {len(found)} recipes for {adapter}")
    return found[0]
