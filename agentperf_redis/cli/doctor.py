"""`agentperf doctor`: check whether a server suits the library, and suggest changes."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from agentperf_redis.backend import Backend
from agentperf_redis.cli.attempts import Refusal, refusals
from agentperf_redis.cli.console import Exit, Target, counted, out, print_json
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.transport.address import ServerKind
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import ExchangeFailed, unavailable
from agentperf_redis.transport.executor import Executor
from agentperf_redis.transport.handshake import OLDEST, Handshake
from agentperf_redis.transport.topology import Node, Topology

PROBES = 100
_SLOW_P99_MS = 10.0
"""If the latency is higher, a lease or a cache hit probably costs more than the work that it saves."""
_NEARLY_FULL = 0.85
_FIXED = {
    "redis": ("CVE-2025-49844", {(7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}),
    "valkey": ("CVE-2025-49844 or CVE-2025-67733", {(7, 2): 12, (8, 0): 7, (8, 1): 6, (9, 0): 3}),
}
"""For each kind of server, the known faults, and the first patch version without them in each release line. Because of
these faults, a user that may run scripts can take over the server, or forge replies to other users. Later release lines
do not have them. Redis 7.0 was not corrected."""
_MAY_NOT_RUN = re.compile(r"permissions? to run\b|can't run\b")
_MAY_NOT_ACCESS = re.compile(r"(?:permissions? to access|can't access|can't publish)\b.*\b(channel|key)")
"""Match the errors, in lower case, that Redis 7.0 to 8.2 and Valkey 9.1 send to a user without the right to run a
command, or without access to a key or a channel."""
_COLOURS = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of one check."""

    subject: str
    level: str
    """"ok", "note" (the server works, but could be set up better) or "bad" (it will lose data or fail)."""
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
    """Query the server, or every primary of a Cluster, and assess the replies.

    Raises:
        BackendUnavailable: the server or a primary does not reply.
    """
    findings: list[Diagnosis] = []
    topology = find_layout(backend)
    for node in topology.primaries:
        findings += _examine_node(backend, topology, node)
    return [*findings, _assess_scripts(backend)]


def _examine_node(backend: Backend, topology: Topology, node: Node) -> Iterator[Diagnosis]:
    """Examine one server.

    The connections make no handshake. So a server is examined even if it is too old, or if its namespace is too new.
    """
    address, name = backend.address, ""
    if topology.scattered:
        address = replace(address, kind=ServerKind.STANDALONE, nodes=((node.host, node.port),))
        name = f"{node.host}:{node.port}"
    try:
        refused = refusals(Connector(address), topology, node, backend.namespace, backend.deadline)
    except ExchangeFailed as failed:
        raise unavailable(address.masked, maybe_applied=False, reason=failed.reason) from None
    with contextlib.closing(Executor(Connector(address), Topology(address), None, backend.deadline, None)) as server:
        findings = [*assess_commands(refused, backend.namespace), *_assess_facts(server), _assess_round_trips(server)]
    for finding in findings:
        yield replace(finding, node=name)


def find_layout(backend: Backend) -> Topology:
    """Return the layout from the first node that reports it."""
    address, fault = backend.address, ""
    topology, connector = Topology(address), Connector(address)
    for _ in range(topology.sources):
        if topology.doubtful:
            node, request = topology.layout_request()
            try:
                fault = topology.learn(node, connector.request(node, request, backend.deadline))
            except ExchangeFailed as failed:
                fault = failed.reason
    if topology.doubtful:
        raise unavailable(address.masked, maybe_applied=False, reason=fault)
    return topology


def assess_commands(refused: Sequence[Refusal], namespace: str) -> list[Diagnosis]:
    """Report the commands that the server refused, with its reason."""
    if not refused:
        return [Diagnosis("commands", "ok", "the server runs every command that the library needs")]
    return [
        Diagnosis("commands", "bad", f"{', '.join(each.commands)}: {each.text}", _remedy(each, namespace))
        for each in refused
    ]


def _remedy(refusal: Refusal, namespace: str) -> str:
    text = refusal.text.lower()
    if "unknown" in text:
        return "the server does not have the command, or rename-command gives it another name"
    if _MAY_NOT_RUN.search(text):
        rights = ("+cluster|slots" if name == "CLUSTER" else f"+{name.lower()}" for name in refusal.commands)
        return f"grant {' '.join(rights)}; `agentperf doctor --acl` prints all rights"
    found = _MAY_NOT_ACCESS.search(text)
    if found is None:
        return ""
    return f"grant {'&' if found[1] == 'channel' else '~'}{namespace}:*"


def _assess_round_trips(server: Executor) -> Diagnosis:
    try:
        return assess_latency(_round_trips_ms(server))
    except AgentPerfError as error:  # for example, the user lacks permission for ECHO
        return Diagnosis("latency", "note", str(error))


def _assess_facts(server: Executor) -> list[Diagnosis]:
    try:
        facts = _facts(server)
    except AgentPerfError as error:  # for example, the user lacks permission for INFO; the other findings still help
        return [
            Diagnosis(
                "facts",
                "note",
                str(error),
                "version, eviction, memory and so on cannot be checked without INFO (+info)",
            )
        ]
    assessments = (assess_version, assess_eviction, assess_memory, assess_persistence, assess_replication)
    return [assess(facts) for assess in assessments]


def _assess_scripts(backend: Backend) -> Diagnosis:
    """Check that the first script runs, and that the server and the namespace have supported versions."""
    opening = Handshake(backend.address.masked, backend.namespace, lambda _: None).opening()
    try:
        backend.run(opening)
    except AgentPerfError as error:
        return Diagnosis("scripts", "bad", str(error), "the library cannot work here")
    return Diagnosis("scripts", "ok", "can be run")


def assess_version(facts: Mapping[str, str]) -> Diagnosis:
    """Check that the server is new enough."""
    name = "valkey" if "valkey_version" in facts else "redis"
    text = facts.get(f"{name}_version", "")
    if not text:
        return Diagnosis("version", "note", "not reported", "the library was tested on Redis and Valkey only")
    version = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if version < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        return Diagnosis("version", "bad", f"{name} {text}", f"the oldest supported version is {oldest}")
    if facts.get("arch_bits", "64") != "64":  # the scripts format microseconds as 64-bit integers
        return Diagnosis("version", "bad", f"{name} {text}, {facts['arch_bits']} bits", "64 bits are required")
    mode = facts.get("redis_mode", facts.get("server_mode", ""))
    found = f"{name} {text}" + (f", {mode}" if mode else "")
    fault = _open_fault(name, text)
    if fault:
        return Diagnosis("version", "note", found, f"{fault}: update it, or let only trusted users run scripts")
    return Diagnosis("version", "ok", found)


def _open_fault(name: str, text: str) -> str:
    """Return those known faults of a version that endanger servers with several users; empty if there is none."""
    fault, fixed = _FIXED[name]
    major, minor, patch, *_ = (*(int(part) for part in text.split(".")[:3] if part.isdigit()), 0, 0, 0)
    line = (major, minor)
    if line > max(fixed) or patch >= fixed.get(line, math.inf):
        return ""
    return fault


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
    median, p99 = statistics.median(ordered), ordered[math.ceil(len(ordered) * 0.99) - 1]  # p99 by nearest rank
    found = f"median {median:.3f} ms, p99 {p99:.3f} ms over {len(ordered)} round trips"
    if p99 > _SLOW_P99_MS:
        return Diagnosis("latency", "note", found, "slow: move the workers nearer, or look for slow commands (SLOWLOG)")
    return Diagnosis("latency", "ok", found)


def _facts(server: Executor) -> dict[str, str]:
    facts: dict[str, str] = {}
    for section in ("server", "memory", "persistence", "replication"):
        facts |= server.run(Command("INFO", (), (section,), parsed_info))
    return facts


def parsed_info(reply: Reply) -> dict[str, str]:
    """Return the fields of a reply to INFO."""
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
