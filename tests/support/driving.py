"""A script for tests only, and the type of a driver for flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from agentperf_redis.script import Script

Run = Callable[[Backend, Any], Any]
"""Runs a flow: `run(backend, flow)`. The fixture `run` of tests/integration/transport provides
such a function for the blocking driver and one for the asyncio driver."""


class Add(Script):
    """Adds to a counter, so that every execution is visible."""

    source = """-- add: add to a counter.
-- KEYS
--   counter  STRING  <namespace>:<name>
-- ARGV
--   amount   int     amount to add
return redis.call('INCRBY', KEYS[1], ARGV[1])
"""


ADD = Add("test/add")


def add(namespace: str, amount: int = 1, name: str = "counter") -> Command[int]:
    return Command(ADD, (f"{namespace}:{name}",), (amount,), int)
