"""Tests of the command that shows the keys of a demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentperf_redis.demo.redis_cli import scan_command
from agentperf_redis.transport.address import parse_url
from agentperf_redis.transport.topology import Node

SCAN = "--scan --pattern 'ns:*'"


@pytest.mark.parametrize(
    ("url", "nodes", "command"),
    [
        ("redis://h:1", [Node("h", 1)], f"redis-cli -u redis://h:1/0 {SCAN}"),
        ("redis://me:pw@h:1/2", [Node("h", 1)], f"redis-cli -u 'redis://me:***@h:1/2' {SCAN}"),
        ("redis://:pw@h:1", [Node("h", 1)], f"redis-cli -u 'redis://:***@h:1/0' {SCAN}"),
        ("redis://[::1]:1", [Node("::1", 1)], f"redis-cli -u 'redis://[::1]:1/0' {SCAN}"),
        (
            "rediss://h:1?ssl_ca_certs=/my ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem",
            [Node("h", 1)],
            f"redis-cli -u rediss://h:1/0 --cacert '/my ca.pem' --cert /c.pem --key /k.pem {SCAN}",
        ),
        ("redis+sentinel://s:26379/main/3", [Node("p", 1)], f"redis-cli -u redis://p:1/3 {SCAN}"),
        ("redis+cluster://a:1", [Node("a", 1)], f"redis-cli -u redis://a:1/0 {SCAN}"),
        (
            "redis+cluster://me:pw@a:1",
            [Node("a", 1), Node("b", 2)],
            f"for server in 'redis://me:***@a:1/0' 'redis://me:***@b:2/0'; do redis-cli -u \"$server\" {SCAN}; done",
        ),
        ("unix:///tmp/my socket?db=2", [Node("", 0)], f"redis-cli -s '/tmp/my socket' -n 2 {SCAN}"),
        ("unix://me:pw@/tmp/s", [Node("", 0)], f"redis-cli -s /tmp/s --user me --askpass {SCAN}"),
    ],
)
def test_every_url_gives_a_command_that_redis_cli_takes(url: str, nodes: list[Node], command: str) -> None:
    assert scan_command(parse_url(url), nodes, None, "ns") == command


def test_embedded_server_is_shown_by_its_socket() -> None:
    command = scan_command(parse_url("embedded:///data"), [Node("/data", 0)], Path("/data/socket"), "ns")
    assert command == f"redis-cli -s /data/socket {SCAN}"
