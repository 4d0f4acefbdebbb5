"""Tests of the layout of a Cluster: the address of a node, however the node announces it."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.transport.address import parse_url
from agentperf_redis.transport.topology import Node, Topology

SEED = Node("seed", 7)


def learned(*primaries: list[Any]) -> Topology:
    topology = Topology(parse_url("redis+cluster://seed:7"))
    reply = [[16383 * at, 16383 * at, primary] for at, primary in enumerate(primaries)]
    assert topology.learn(SEED, reply) == ""
    return topology


# The replies are from Valkey 9.1 and Redis 8.2, with each value of cluster-preferred-endpoint-type.
@pytest.mark.parametrize(
    ("primary", "node"),
    [
        ([b"10.0.0.1", 1, b"id", []], Node("10.0.0.1", 1)),
        ([b"host.example", 1, b"id", [b"ip", b"10.0.0.1"]], Node("host.example", 1)),
        ([b"?", 1, b"id", [b"ip", b"10.0.0.1"]], Node("10.0.0.1", 1)),
        ([b"?", 1, b"id", [b"ip", b""]], Node("seed", 1)),
        ([b"?", 1, b"id"], Node("seed", 1)),
        ([b"", 1, b"id", []], Node("seed", 1)),
        ([None, 1, b"id", [b"ip", b"10.0.0.1"]], Node("seed", 1)),
        ([None, 1, b"id", [b"ip", b"10.0.0.1", b"hostname", b"host.example"]], Node("seed", 1)),
    ],
)
def test_announced_address_gives_the_node(primary: list[Any], node: Node) -> None:
    assert learned(primary).primaries == (node,)


@pytest.mark.parametrize(
    "reply", [None, [], [[0, 1]], [[0, 1, [b"?", 1, b"id", [b"ip", None]]]], [[0, 1, [7, 1]]], [[None, 1, [b"h", 1]]]]
)
def test_unreadable_layout_is_reported(reply: Any) -> None:
    topology = Topology(parse_url("redis+cluster://seed:7"))
    assert topology.learn(SEED, reply)
    assert (topology.primaries, topology.doubtful) == ((), True)


@pytest.mark.parametrize(
    ("address", "node"),
    [
        ("10.0.0.2:2", Node("10.0.0.2", 2)),
        ("2001:db8::1:2", Node("2001:db8::1", 2)),
        (":2", Node("seed", 2)),
        ("?:2", Node("n2", 2)),  # the only node with that port
        ("?:9", Node("seed", 9)),  # no known node has that port
        ("?:1", Node("seed", 1)),  # two nodes have that port
    ],
)
def test_redirect_without_a_host_finds_the_node(address: str, node: Node) -> None:
    topology = learned([b"n1", 1, b"id"], [b"n2", 2, b"id"])
    topology.learn(SEED, [[0, 1, [b"n1", 1]], [2, 3, [b"n2", 2]], [4, 5, [b"n3", 1]]])
    assert topology.redirected(address, SEED) == node
