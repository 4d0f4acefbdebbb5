"""Tries every command that the library needs: directly, in a script or on the bus, as the library runs it.

A server may refuse a command (ACL), or may not know it (rename-command). The attempts write only one key, a string that
expires after ten seconds. A command for a type other than string fails with WRONGTYPE. This error shows that the server
would run the command.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from agentperf_redis.command import Reply
from agentperf_redis.script import Script
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.resp import ServerError, pack
from agentperf_redis.transport.topology import Node, Topology

_PASSED = ("WRONGTYPE", "NOSCRIPT", "NOSUB")
"""An error with one of these prefixes is no refusal of the command. EVALSHA gets NOSCRIPT if only EVAL was refused.
SUNSUBSCRIBE gets NOSUB from Valkey 8.0 if only SSUBSCRIBE was refused."""
_SCRATCH_MS = "10000"

_CALLER = Script(
    "doctor/attempts",
    """-- attempts: call commands, and return the error of each.
-- KEYS
--   scratch  STRING  <namespace>:{doctor:<random>}:scratch
-- ARGV
--   words... text    of each command: the number of its words, then its words
-- RETURNS
--   {text, ...}  the error of each command, empty if there was none
local errors, at = {}, 1
while ARGV[at] do
  local count = tonumber(ARGV[at])
  local reply = redis.pcall(unpack(ARGV, at + 1, at + count))
  errors[#errors + 1] = type(reply) == 'table' and reply.err or ''
  at = at + 1 + count
end
return errors
""",
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Commands that a server refused for the same reason.

    Attributes:
        commands: names of the commands.
        text: the error of the server.
    """

    commands: tuple[str, ...]
    text: str


def refusals(connector: Connector, topology: Topology, node: Node, namespace: str, timeout_s: float) -> list[Refusal]:
    """Attempt every command on a node.

    Args:
        connector: creates the connection.
        topology: the known layout.
        node: the server.
        namespace: prefix of the scratch key.
        timeout_s: seconds for all attempts together.

    Raises:
        ExchangeFailed: the node was unreachable or did not answer in time.
    """
    key, channel = _scratch(topology, node, namespace)
    called = script_calls(key, channel)
    flat = [word for words in called for word in (str(len(words)), *words)]
    by_script = ("EVAL", _CALLER.source, "1", key, *flat)
    sent = [*client_calls(key, connector.address.db, clustered=topology.scattered), by_script]
    sent += [("EVALSHA", _CALLER.sha, "1", key), *bus_calls(channel)]
    replies = connector.requests(node, b"".join(map(pack, sent)), len(sent), timeout_s)
    found: dict[str, list[str]] = {}
    for name, text in _errors(sent, called, replies):
        if not text.startswith(_PASSED) and name not in found.setdefault(text, []):
            found[text].append(name)
    return [Refusal(tuple(names), text) for text, names in found.items() if names]


def client_calls(key: str, db: int, *, clustered: bool) -> list[tuple[str, ...]]:
    """Return the commands that clients send directly, not in scripts or on the bus. Their arguments change no data."""
    calls: list[tuple[str, ...]] = [("PING",), ("ECHO", key), ("SELECT", str(db))]
    if clustered:
        calls += [("CLUSTER", "SLOTS"), ("ASKING",)]
    return [
        *calls,
        ("TYPE", key),
        ("GETRANGE", key, "0", "0"),
        ("MGET", key),
        ("PTTL", key),
        ("PEXPIRETIME", key),
        ("HGET", key, "field"),
        ("HGETALL", key),
        ("HLEN", key),
        ("HMGET", key, "field"),
        ("HSCAN", key, "0", "COUNT", "1"),
        ("LRANGE", key, "0", "0"),
        ("XRANGE", key, "-", "+", "COUNT", "1"),
        ("XREVRANGE", key, "+", "-", "COUNT", "1"),
        ("ZCARD", key),
        ("ZMSCORE", key, "member"),
        ("ZRANGE", key, "0", "0"),
        ("ZREM", key, "member"),
        ("ZSCORE", key, "member"),
    ]


def script_calls(key: str, channel: str) -> list[tuple[str, ...]]:
    """Return the commands that scripts call. The first command makes the scratch key; the last commands delete it."""
    return [
        ("SET", key, "scratch", "PX", _SCRATCH_MS),
        ("EXISTS", key),
        ("GET", key),
        ("GETRANGE", key, "0", "0"),
        ("HDEL", key, "field"),
        ("HEXISTS", key, "field"),
        ("HGET", key, "field"),
        ("HGETALL", key),
        ("HINCRBY", key, "field", "1"),
        ("HLEN", key),
        ("HMGET", key, "field"),
        ("HRANDFIELD", key, "1"),
        ("HSCAN", key, "0", "COUNT", "1"),
        ("HSET", key, "field", "value"),
        ("HSETNX", key, "field", "value"),
        ("LINDEX", key, "0"),
        ("LLEN", key),
        ("LPOP", key),
        ("LRANGE", key, "0", "0"),
        ("LTRIM", key, "0", "-1"),
        ("MGET", key),
        ("PERSIST", key),
        ("PEXPIRE", key, _SCRATCH_MS),  # after PERSIST, so that the scratch key expires again
        ("PEXPIRETIME", key),
        ("PTTL", key),
        ("RENAME", key, key),
        ("RPUSH", key, "value"),
        ("SPUBLISH", channel, "message"),
        ("TIME",),
        ("TYPE", key),
        ("XADD", key, "MAXLEN", "~", "1", "*", "field", "value"),
        ("XLEN", key),
        ("ZADD", key, "XX", "GT", "1", "member"),
        ("ZCARD", key),
        ("ZCOUNT", key, "(0", "+inf"),
        ("ZDIFF", "2", key, key),
        ("ZMSCORE", key, "member"),
        ("ZPOPMIN", key, "1"),
        ("ZRANGE", key, "0", "0"),
        ("ZRANGEBYSCORE", key, "-inf", "0", "LIMIT", "0", "1"),
        ("ZRANK", key, "member"),
        ("ZREM", key, "member"),
        ("ZREMRANGEBYRANK", key, "0", "0"),
        ("ZREMRANGEBYSCORE", key, "-inf", "0"),
        ("ZREVRANGE", key, "0", "0", "WITHSCORES"),
        ("ZSCAN", key, "0", "COUNT", "1"),
        ("ZSCORE", key, "member"),
        ("ZUNIONSTORE", key, "1", key),
        ("UNLINK", key),
        ("PEXPIREAT", key, "1"),
    ]


def bus_calls(channel: str) -> list[tuple[str, ...]]:
    """Return the commands of the message bus."""
    return [("SSUBSCRIBE", channel), ("PING",), ("SUNSUBSCRIBE", channel)]


def _scratch(topology: Topology, node: Node, namespace: str) -> tuple[str, str]:
    """Return a new key and a new channel, in a slot of the node."""
    while True:
        tag = f"{namespace}:{{doctor:{secrets.token_hex(6)}}}"
        if topology.node_for(f"{tag}:scratch") == node:
            return f"{tag}:scratch", f"{tag}:bus"


def _errors(
    sent: list[tuple[str, ...]], called: list[tuple[str, ...]], replies: list[Reply]
) -> Iterator[tuple[str, str]]:
    """Yield the name and the error of each refused command."""
    for words, reply in zip(sent, replies, strict=True):
        if isinstance(reply, ServerError):
            yield words[0], reply.text
        elif words[0] == "EVAL" and isinstance(reply, list):
            for inner, text in zip(called, reply, strict=False):
                if isinstance(text, bytes) and text:
                    yield inner[0], text.decode(errors="replace")
