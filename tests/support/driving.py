"""A script of the tests' own, and what drives a flow through a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from agentperf_redis.script import Script

Run = Callable[[Backend, Any], Any]
"""Drives a flow: `run(backend, flow)`. The fixture `run` of the transport's tests does it with either driver."""


class Add(Script):
    """A script of the tests' own: adds to a counter, so that every execution is seen."""

    source = """-- add: add to a counter.
-- KEYS
--   counter  STRING  <namespace>:<name>
-- ARGV
--   amount   int     what to add
return redis.call('INCRBY', KEYS[1], ARGV[1])
"""


ADD = Add("test/add")


def add(namespace: str, amount: int = 1, name: str = "counter") -> Command[int]:
    return Command(ADD, (f"{namespace}:{name}",), (amount,), int)
