"""`agentperf doctor`: is this server fit for the job, and what should be changed?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.cli.console import Exit, Target, counted, out, print_json
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.greeting import OLDEST

PROBES = 100
_SLOW_P99_MS = 10.0
"""Above this, a lease or a hit costs more than the work it saves is likely to be worth."""
_NEARLY_FULL = 0.85
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    subject: str
    level: str
    """"ok", "note" (works, could be better) or "bad" (will lose data or fail)."""
    found: str
    advice: str = ""


def doctor(target: Target, *, as_json: bool) -> Exit:
    """Examine the server; exit 1 if anything is bad."""
    with target.connect() as perf:
        findings = examine(perf.backend)
        address, namespace = perf.backend.address.masked, perf.backend.namespace
    bad = any(finding.level == "bad" for finding in findings)
    if as_json:
        print_json("doctor", {"server": address, "healthy": not bad, "findings": [_plain(each) for each in findings]})
    else:
        out.print(f"Server {address}, namespace {namespace}", markup=False)
        table = Table(box=None, pad_edge=False)
        for column in ("", "what", "found", "advice"):
            table.add_column(column, overflow="fold")
        for each in findings:
            table.add_row(_MARKS[each.level], each.subject, each.found, each.advice)
        out.print(table)
    return Exit.FAILURE if bad else Exit.OK


def examine(backend: Backend) -> list[Finding]:
    """Ask the server and judge its answers."""
    scripts = backend.run(Command("EXISTS", (keys.meta(backend.namespace),), (), lambda reply: reply))  # opens it
    facts = _info(backend)
    return [
        judge_version(facts),
        Finding("scripts", "ok" if scripts == 1 else "bad", "run" if scripts == 1 else "the first one left no trace"),
        judge_eviction(facts),
        judge_memory(facts),
        judge_persistence(facts),
        judge_replication(facts),
        judge_latency(_round_trips_ms(backend)),
    ]


def judge_version(facts: Mapping[str, str]) -> Finding:
    """Is the server new enough?"""
    name = "valkey" if "valkey_version" in facts else "redis"
    text = facts.get("valkey_version") or facts.get("redis_version", "")
    version = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if version and version < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        return Finding("version", "bad", f"{name} {text}", f"{oldest} is the oldest that works")
    mode = facts.get("redis_mode", facts.get("server_mode", ""))
    return Finding("version", "ok", f"{name} {text}" + (f", {mode}" if mode else ""))


def judge_eviction(facts: Mapping[str, str]) -> Finding:
    """Would the server throw away leases or indexes when memory runs out?"""
    policy = facts.get("maxmemory_policy", "")
    if policy == "noeviction":
        return Finding("eviction", "ok", policy)
    if policy.startswith("volatile-"):
        return Finding(
            "eviction", "note", policy, "cache values may go early; noeviction keeps the library's own limits in charge"
        )
    return Finding(
        "eviction",
        "bad",
        policy or "unknown",
        "leases and indexes may be thrown away: CONFIG SET maxmemory-policy noeviction",
    )


def judge_memory(facts: Mapping[str, str]) -> Finding:
    """How near is the server to its limit?"""
    used, limit = int(facts.get("used_memory", 0)), int(facts.get("maxmemory", 0))
    shown = f"{used / 2**20:.1f} MiB used"
    if not limit:
        return Finding(
            "memory", "note", f"{shown}, no limit", "set maxmemory, so that the system's memory is not used up"
        )
    level = "note" if used > _NEARLY_FULL * limit else "ok"
    return Finding(
        "memory",
        level,
        f"{shown} of {limit / 2**20:.1f} MiB",
        "nearly full: raise maxmemory or lower the limits of the caches" if level == "note" else "",
    )


def judge_persistence(facts: Mapping[str, str]) -> Finding:
    """What does a restart of the server cost?"""
    if facts.get("aof_enabled") == "1":
        if facts.get("aof_last_write_status", "ok") != "ok":
            return Finding("persistence", "bad", "append-only file, last write failed", "look at the disk and the log")
        return Finding("persistence", "ok", "append-only file")
    if facts.get("rdb_last_bgsave_status", "ok") != "ok":
        return Finding("persistence", "bad", "last snapshot failed", "look at the disk and the log")
    return Finding(
        "persistence", "note", "snapshots at best", "a restart may lose metrics and leases: CONFIG SET appendonly yes"
    )


def judge_replication(facts: Mapping[str, str]) -> Finding:
    """Is this a primary, and what would a failover lose?"""
    role, replicas = facts.get("role", "unknown"), facts.get("connected_slaves", "0")
    if role != "master":
        return Finding("role", "bad", role, "writes go to the primary: give its address, or a Sentinel or Cluster URL")
    return Finding("role", "ok", f"primary, {counted(int(replicas), 'replica')}")


def judge_latency(times_ms: list[float]) -> Finding:
    """How long does a round trip take from here?"""
    ordered = sorted(times_ms)
    median, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    found = f"median {median:.3f} ms, p99 {p99:.3f} ms over {len(ordered)} round trips"
    if p99 > _SLOW_P99_MS:
        return Finding("latency", "note", found, "slow: bring the workers nearer, or look for slow commands (SLOWLOG)")
    return Finding("latency", "ok", found)


def _info(backend: Backend) -> dict[str, str]:
    facts: dict[str, str] = {}
    for section in ("server", "memory", "persistence", "replication"):
        try:
            facts |= backend.run(Command("INFO", (), (section,), _parsed))
        except AgentPerfError as error:  # an ACL user without INFO: the other findings still help
            if not facts:
                facts["maxmemory_policy"] = f"unknown ({error})"
    return facts


def _parsed(reply: Reply) -> dict[str, str]:
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))


def _round_trips_ms(backend: Backend) -> list[float]:
    echo = Command("ECHO", (keys.meta(backend.namespace),), (), lambda _: None)
    times = []
    for _ in range(PROBES):
        start = time.perf_counter()
        backend.run(echo)
        times.append((time.perf_counter() - start) * 1000)
    return times


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "subject": finding.subject,
        "level": finding.level,
        "found": finding.found,
        "advice": finding.advice,
    }
