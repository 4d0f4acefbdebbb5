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
    """Adds to a counter, so that every execution is visible. It calls only commands that a worker may run."""

    source = """-- add: add to a counter.
-- KEYS
--   counter  STRING  <namespace>:<name>
-- ARGV
--   amount   int     amount to add
local sum = (tonumber(redis.call('GET', KEYS[1])) or 0) + tonumber(ARGV[1])
redis.call('SET', KEYS[1], string.format('%d', sum))
return sum
"""


ADD = Add("test/add")


def add(namespace: str, amount: int = 1, name: str = "counter") -> Command[int]:
    return Command(ADD, (f"{namespace}:{name}",), (amount,), int)
