"""Runs commands on a Cluster node by node, so that the nodes do not compete for the cores of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Command
from agentperf_redis.transport.topology import Node


def run_by_node(backend: Backend, commands: Sequence[Command[Any]]) -> list[Any]:
    """Run commands in one pipeline for each node, one node after the other. Returns all results in order.

    On a machine with fewer cores than busy nodes, the nodes would interrupt each other and displace each other's data
    from the caches of the processor. The times in `INFO commandstats` are read from a clock, so they would include the
    interruptions.
    """
    by_node: dict[Node, list[int]] = {}
    for at, command in enumerate(commands):
        node = backend.node_of(command.keys[0])
        assert node is not None, "run one command of each node first, so that the layout is known"
        by_node.setdefault(node, []).append(at)
    results: list[Any] = [None] * len(commands)
    for places in by_node.values():
        found = backend.run(Batch(tuple(commands[at] for at in places)))
        for at, result in zip(places, found, strict=True):
            results[at] = result
    return results
