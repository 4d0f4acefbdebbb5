"""`agentperf doctor`: check whether a server suits the library, and suggest changes."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.cli.console import Exit, Target, counted, out, print_json
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, shown
from agentperf_redis.transport.address import Address, ServerKind
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.executor import Executor
from agentperf_redis.transport.handshake import OLDEST
from agentperf_redis.transport.topology import Topology

PROBES = 100
_SLOW_P99_MS = 10.0
"""With a higher latency, a lease or a cache hit probably costs more than the work that it saves."""
_NEARLY_FULL = 0.85
_COLOURS = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of one check."""

    subject: str
    level: str
    """"ok", "note" (works, could be better) or "bad" (will lose data or fail)."""
    found: str
    advice: str = ""
    node: str = ""
    """Node of a Cluster; empty for a single server, or for a result about all nodes."""


def doctor(target: Target, *, as_json: bool) -> Exit:
    """Examine the server; exit 1 if anything is bad."""
    with target.connect() as perf:
        findings = examine(perf.backend)
        address, namespace = perf.backend.address.masked, perf.backend.namespace
    bad = any(finding.level == "bad" for finding in findings)
    if as_json:
        print_json("doctor", {"server": address, "healthy": not bad, "findings": [_plain(each) for each in findings]})
    else:
        out.print(f"Server {address}, namespace {namespace}")
        table = Table(box=None, pad_edge=False)
        nodes = any(finding.node for finding in findings)
        for column in ("", *(("node",) if nodes else ()), "what", "found", "advice"):
            table.add_column(column, overflow="fold")
        for each in findings:
            mark = Text(each.level, style=_COLOURS[each.level])
            table.add_row(mark, *((each.node,) if nodes else ()), each.subject, each.found, each.advice)
        out.print(table)
    return Exit.FAILURE if bad else Exit.OK


def examine(backend: Backend) -> list[Diagnosis]:
    """Query the server, or every primary of a Cluster, and judge the replies.

    Raises:
        BackendUnavailable: the server or a primary does not reply.
    """
    findings = []
    for name, server in _servers(backend):
        with contextlib.closing(server):
            latency = assess_latency(_round_trips_ms(server))  # first, since this fails if the server is unreachable
            findings += [replace(finding, node=name) for finding in (*_assess_facts(server), latency)]
    return [*findings, _assess_handshake(backend)]


def _assess_facts(server: Executor) -> list[Diagnosis]:
    try:
        facts = _facts(server)
    except AgentPerfError as error:  # the user may not run INFO; the other findings still help
        return [Diagnosis("facts", "note", str(error), "grant +info to check version, eviction, memory and so on")]
    assessments = (assess_version, assess_eviction, assess_memory, assess_persistence, assess_replication)
    return [assess(facts) for assess in assessments]


def _assess_handshake(backend: Backend) -> Diagnosis:
    """Check that scripts run, and that the server and the namespace have supported versions."""
    try:
        exists = backend.run(Command("EXISTS", (keys.meta(backend.namespace),), (), lambda reply: reply))
    except AgentPerfError as error:
        return Diagnosis("scripts", "bad", str(error), "the library cannot work here")
    return Diagnosis(
        "scripts", "ok" if exists == 1 else "bad", "run" if exists == 1 else "the first script wrote nothing"
    )


def assess_version(facts: Mapping[str, str]) -> Diagnosis:
    """Check that the server is new enough."""
    name = "valkey" if "valkey_version" in facts else "redis"
    text = facts.get("valkey_version") or facts.get("redis_version", "")
    version = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if version and version < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        return Diagnosis("version", "bad", f"{name} {text}", f"the oldest supported version is {oldest}")
    if facts.get("arch_bits", "64") != "64":  # the scripts format microseconds as integers of the machine's size
        return Diagnosis("version", "bad", f"{name} {text}, {facts['arch_bits']} bits", "64 bits are required")
    mode = facts.get("redis_mode", facts.get("server_mode", ""))
    return Diagnosis("version", "ok", f"{name} {text}" + (f", {mode}" if mode else ""))


def assess_eviction(facts: Mapping[str, str]) -> Diagnosis:
    """Check whether the server may evict leases or indexes when memory runs out."""
    policy = facts.get("maxmemory_policy", "")
    if policy == "noeviction":
        return Diagnosis("eviction", "ok", policy)
    if policy.startswith("volatile-"):
        return Diagnosis(
            "eviction",
            "note",
            policy,
            "the server may evict cache values early; with noeviction only the library's limits apply",
        )
    return Diagnosis(
        "eviction",
        "bad",
        policy or "unknown",
        "the server may evict leases and indexes: CONFIG SET maxmemory-policy noeviction",
    )


def assess_memory(facts: Mapping[str, str]) -> Diagnosis:
    """Check how near the server is to its memory limit."""
    used, limit = int(facts.get("used_memory", 0)), int(facts.get("maxmemory", 0))
    shown = f"{used / 2**20:.1f} MiB used"
    if not limit:
        return Diagnosis(
            "memory",
            "note",
            f"{shown}, no limit",
            "set maxmemory, so that the server cannot exhaust the system's memory",
        )
    level = "note" if used > _NEARLY_FULL * limit else "ok"
    return Diagnosis(
        "memory",
        level,
        f"{shown} of {limit / 2**20:.1f} MiB",
        "nearly full: raise maxmemory or lower the limits of the caches" if level == "note" else "",
    )


def assess_persistence(facts: Mapping[str, str]) -> Diagnosis:
    """Check how much data a restart of the server loses."""
    if facts.get("aof_enabled") == "1":
        if facts.get("aof_last_write_status", "ok") != "ok":
            return Diagnosis(
                "persistence", "bad", "append-only file, last write failed", "check the disk and the server's log"
            )
        return Diagnosis("persistence", "ok", "append-only file")
    if facts.get("rdb_last_bgsave_status", "ok") != "ok":
        return Diagnosis("persistence", "bad", "last snapshot failed", "check the disk and the server's log")
    return Diagnosis(
        "persistence", "note", "snapshots at best", "a restart may lose metrics and leases: CONFIG SET appendonly yes"
    )


def assess_replication(facts: Mapping[str, str]) -> Diagnosis:
    """Check that the server is a primary, and count its replicas."""
    role, replicas = facts.get("role", "unknown"), facts.get("connected_slaves", "0")
    if role != "master":
        return Diagnosis("role", "bad", role, "writes need the primary: use its address, or a Sentinel or Cluster URL")
    return Diagnosis("role", "ok", f"primary, {counted(int(replicas), 'replica')}")


def assess_latency(times_ms: list[float]) -> Diagnosis:
    """Check how long a round trip from this machine takes."""
    ordered = sorted(times_ms)
    median, p99 = statistics.median(ordered), ordered[math.ceil(len(ordered) * 0.99) - 1]  # nearest rank
    found = f"median {median:.3f} ms, p99 {p99:.3f} ms over {len(ordered)} round trips"
    if p99 > _SLOW_P99_MS:
        return Diagnosis("latency", "note", found, "slow: move the workers nearer, or look for slow commands (SLOWLOG)")
    return Diagnosis("latency", "ok", found)


def _servers(backend: Backend) -> Iterator[tuple[str, Executor]]:
    """Yield the name and an executor of each primary. Outside a Cluster the name is empty.

    The executors make no handshake, so that a server is examined even if it is too old or its namespace is too new.
    """
    address = backend.address

    def executor(target: Address) -> Executor:
        return Executor(Connector(target), Topology(target), None, backend.deadline, None)

    if address.kind is not ServerKind.CLUSTER:
        yield "", executor(address)
        return
    for host, port in _layout([(seed, executor(_node(address, *seed))) for seed in address.nodes]):
        yield f"{host}:{port}", executor(_node(address, host, port))


def _node(address: Address, host: str, port: int) -> Address:
    return replace(address, kind=ServerKind.STANDALONE, nodes=((host, port),))


def _layout(seeds: Sequence[tuple[tuple[str, int], Executor]]) -> list[tuple[str, int]]:
    """Return the primaries from the first node that replies."""
    for (host, _), seed in seeds:
        with contextlib.closing(seed):
            try:
                found = seed.run(Command("CLUSTER", (), ("SLOTS",), _primaries))
            except BackendUnavailable:
                if seed is seeds[-1][1]:
                    raise
            else:
                return [(name or host, port) for name, port in found]  # a node may not know its own host
    return []


def _primaries(reply: Reply) -> list[tuple[str, int]]:
    """Parse the primaries from CLUSTER SLOTS, in slot order. A host is empty if the node does not know its own host."""
    try:
        found = [(primary[0].decode() if primary[0] else "", int(primary[1])) for _, _, primary, *_ in sorted(reply)]
    except (AttributeError, IndexError, TypeError, ValueError):
        raise CorruptState("CLUSTER SLOTS", f"an unexpected reply {shown(reply)}") from None
    return list(dict.fromkeys(found))


def _facts(server: Executor) -> dict[str, str]:
    facts: dict[str, str] = {}
    for section in ("server", "memory", "persistence", "replication"):
        facts |= server.run(Command("INFO", (), (section,), _parsed))
    return facts


def _parsed(reply: Reply) -> dict[str, str]:
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))


def _round_trips_ms(server: Executor) -> list[float]:
    echo = Command("ECHO", (), ("agentperf",), lambda _: None)
    times = []
    for _ in range(PROBES):
        start = time.perf_counter()
        server.run(echo)
        times.append((time.perf_counter() - start) * 1000)
    return times


def _plain(finding: Diagnosis) -> dict[str, Any]:
    return {
        "node": finding.node,
        "subject": finding.subject,
        "level": finding.level,
        "found": finding.found,
        "advice": finding.advice,
    }
