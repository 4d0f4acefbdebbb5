"""The Python blocks of the README."""

from __future__ import annotations

import re

from tests.support.places import README

BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
RECIPES = [block for block in BLOCKS if "agentperf_redis.integrations" in block]
"""Parts of a user's program for another framework. The tests of the framework run them."""
USERS_TESTS = [block for block in BLOCKS if "def test_" in block]
"""Tests as users write them. tests/integration/test_testing.py runs them."""
PROGRAMS = [block for block in BLOCKS if block not in RECIPES + USERS_TESTS]
