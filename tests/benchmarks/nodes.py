"""Runs commands on a Cluster node by node, so that the nodes do not compete for the cores of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Command


def run_by_node(backend: Backend, commands: Sequence[Command[Any]]) -> list[Any]:
    """Run commands in one pipeline for each node, one node after the other. Returns all results in order.

    A server counts the time of a command by the clock. On a machine with fewer cores than busy nodes, the nodes would
    interrupt each other, and would count the interruptions too.
    """
    by_node: dict[Any, list[int]] = {}
    for at, command in enumerate(commands):
        by_node.setdefault(backend.node_of(command.keys[0]), []).append(at)
    results: list[Any] = [None] * len(commands)
    for places in by_node.values():
        found = backend.run(Batch(tuple(commands[at] for at in places)))
        for at, result in zip(places, found, strict=True):
            results[at] = result
    return results
