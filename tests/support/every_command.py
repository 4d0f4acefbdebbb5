"""Every command of the command line, with an example call: `tests/integration/cli/test_every_command.py` runs all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer.main

from agentperf_redis import AgentInstance, AgentPerf, PoolSettings
from agentperf_redis.cli.app import app
from tests.support.commandline import NOT_FOUND, OK, USAGE
from tests.support.places import DATA


@dataclass(frozen=True)
class Example:
    """How to call a command, and its results.

    Attributes:
        words: the arguments, in a namespace that `fill` has filled. ``<token>`` is the token of a lease, and
            ``<namespace>`` is the namespace.
        shows: texts of the output.
        empty: the exit code in an empty namespace.
        says: a text of stdout or stderr in an empty namespace.
        changes: whether the command changes what `fill` has made.
        local: whether the command needs no server.
        slow: whether a call takes seconds.
        raw: whether the output is text that is not fitted to the width of the terminal.
        own_exits: whether it has exit codes of its own, and prints errors to stdout.
        needs: a module that is not in the extra `test`. Without it, the command is not run.
    """

    words: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    empty: int = OK
    says: str = ""
    changes: bool = False
    local: bool = False
    slow: bool = False
    raw: bool = False
    own_exits: bool = False
    needs: str = ""


def _of_pool(*words: str, shows: str, changes: bool = True) -> Example:
    return Example(("coder", *words), (shows,), NOT_FOUND, "not found: pool 'coder'", changes=changes)


def _of_cache(*words: str, shows: str, changes: bool = True, raw: bool = False) -> Example:
    return Example(("answers", *words), (shows,), NOT_FOUND, "not found: cache 'answers'", changes=changes, raw=raw)


_RULES = str(DATA / "alerts.toml")
_NOTHING = "Nothing was recorded."
_UNKNOWN = "no records; `agentperf agents` lists all agents"

EXAMPLES: dict[str, Example] = {
    "version": Example(shows=(".",), local=True),
    "up": Example(shows=("unix://",), local=True, slow=True),
    "down": Example(local=True, slow=True),
    "demo": Example(("--files", "2", "--workers", "1"), ("reviewed by 1 workers",), local=True, slow=True),
    "exporter": Example(("--port", "0"), local=True, slow=True),
    "serve": Example(("--port", "0"), local=True, slow=True),
    "export grafana": Example((), ("agentperf",), local=True, needs="grafana_foundation_sdk"),
    "export prometheus-rules": Example((_RULES,), ("groups:",), local=True),
    "export csv": Example(("agents",), ("agent,", "planner,"), raw=True),
    "export ndjson": Example(("executions",), ('"planner"',), raw=True),
    "workers": Example((), ("leases", "pending", "ok"), says="No process records or holds leases now."),
    "running": Example((), ("hung", "age s", "ok"), says="Nothing has been running for a second."),
    "status": Example((), ("planner", "answers", "coder", "TimeoutError × 2"), says="Nothing here yet"),
    "top": Example(("--count", "1"), ("tasks", "failed", "p95 s", "firing"), says="queue"),
    "agents": Example(("--window", "1h"), ("planner", "TimeoutError × 2", "last seen"), says=_NOTHING),
    "show": Example(("planner",), ("planner, all time: 4 executions", "TimeoutError"), NOT_FOUND, _UNKNOWN),
    "series": Example(("planner", "--window", "10m"), ("planner, 10m by 1m", "p95 s"), NOT_FOUND, "no records"),
    "forget": Example(("planner", "--yes"), ("Forgot 1 agent.",), NOT_FOUND, _UNKNOWN, changes=True),
    "errors": Example((), ("planner", "TimeoutError", "50.0%"), says=_NOTHING),
    "slow": Example((), ("planner", "critic", "0.250"), says=_NOTHING),
    "rank": Example((), ("critic", "planner", "score"), says=_NOTHING),
    "compare": Example(("planner", "critic"), ("task_count", "+100.0%"), NOT_FOUND, _UNKNOWN),
    "spans": Example(("planner",), ("think",), NOT_FOUND, _UNKNOWN),
    "doctor": Example((), ("commands", "version", "latency"), says="commands"),
    "inspect": Example(
        ("<namespace>:{lb:coder}:state",),
        ("#picks", "leases granted so far", "TTL"),
        NOT_FOUND,
        "not found: key",
        raw=True,
    ),
    "alerts list": Example((), ("failing", "firing", "ops/command"), says="No rule is deployed"),
    "alerts log": Example((), ("failing", "planner", "firing"), says="No alert has changed its state."),
    "alerts deploy": Example((_RULES,), ("Deployed 3 rules",), says="Deployed 3 rules", changes=True),
    "alerts test": Example((_RULES, "--since", "1h"), ("No rule would have fired",), says="No rule would have fired"),
    "alerts run": Example(("--once",), (" sent or tried.",), says="0 transitions"),
    "alerts silence": Example(("failing", "--for", "1h"), ("Silenced until",), USAGE, "none is deployed", changes=True),
    "alerts unsilence": Example(("failing",), ("has ended",), USAGE, "none is deployed", changes=True),
    "check": Example(
        ("--agent", "planner", "--when", "failure_rate > 90%"), ("OK: planner",), raw=True, own_exits=True
    ),
    "lb status": Example(
        (), ("coder", "least_loaded", "unhealthy", "out of rotation"), says="No instance is registered."
    ),
    "lb events": _of_pool("--once", shows="registered", changes=False),
    "lb leases": _of_pool(shows="held s", changes=False),
    "lb drain": _of_pool("p0", shows="takes no new work"),
    "lb undrain": _of_pool("p0", shows="no longer draining"),
    "lb mark-healthy": _of_pool("p1", shows="p1 of coder is marked healthy."),
    "lb mark-unhealthy": _of_pool("p0", shows="takes no new work until it is marked healthy"),
    "lb update": _of_pool("p0", "--capacity", "9", shows="capacity 9"),
    "lb remove": _of_pool("p0", "--yes", shows="Removed p0 from coder"),
    "lb release": _of_pool("<token>", "--yes", shows="its capacity is free"),
    "lb rest": _of_pool("p0", "--for", "20s", shows="takes no new work until"),
    "lb delete-pool": _of_pool("--yes", shows="Deleted pool coder with 2 instances and 1 lease."),
    "lb repair": _of_pool(shows="nothing to repair"),
    "cache list": Example((), ("answers", "docs", "tiered", "last use"), says="No cache is in use."),
    "cache stats": _of_cache(shows="hit rate", changes=False),
    "cache keys": _of_cache(shows="why?", changes=False, raw=True),
    "cache top": _of_cache(shows="why?", changes=False),
    "cache get": _of_cache("why?", shows="because", changes=False, raw=True),
    "cache delete": _of_cache("why?", "--yes", shows="Removed 1 key of 1"),
    "cache clear": _of_cache("--yes", shows="which held 1 entry"),
    "cache reshard": _of_cache("--shards", "1", "--yes", shows="has 1 shard", changes=False),
    "cache drop": _of_cache("--yes", shows="Dropped cache answers"),
    "cache invalidate-tag": _of_cache("easy", "--yes", shows="is a miss"),
}
"""Name of a command -> its example. A new command needs an example here and a schema in `schemas.py`."""


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and the object of each command."""
    root: Any = typer.main.get_command(app) if group is None else group
    for word, command in root.commands.items():
        full = f"{name} {word}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, full)
        else:
            yield full, command


def groups() -> Iterator[tuple[str, Any]]:
    """Yield the name and the object of each group of commands."""
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            yield name, command


def fill(perf: AgentPerf) -> str:
    """Use each service, and return the token of a lease. A second call restores what commands have changed."""
    metrics, lb = perf.metrics, perf.balancer()
    for agent, failures in (("planner", 2), ("critic", 0)):
        metrics.forget(agent)
        for number in range(4 if failures else 2):
            metrics.record_execution(
                agent, 0.125 * (1 + number % 2), number >= failures, "TimeoutError" if number < failures else None
            )
    with metrics.span("planner", "think"):
        pass
    metrics.record_llm("planner", model="m", tokens_in=3, cost=0.25)
    metrics.flush()
    perf.alerts.deploy(text=_DEPLOYED)
    perf.alerts.evaluate(as_of=time.time() + 120)
    cache = perf.cache("answers", max_size=7)
    cache.delete("why?")
    cache.get_or_compute("why?", _because, tags=["easy"])
    cache.get("why?")
    cache.flush()
    perf.tiered_cache("docs", hot_size=2).put("page", "text")
    for name in ("p0", "p1"):
        lb.register_instance(AgentInstance(name, "coder", max_capacity=5))
    lb.configure("coder", PoolSettings(eject_after=9))
    lb.undrain("coder", "p0")
    lb.mark_healthy("coder", "p0")
    lb.mark_unhealthy("coder", "p1")
    held = lb.acquire("coder")
    assert held is not None
    assert held.lease is not None
    _held.append(held)
    return held.lease.token


_DEPLOYED = """
[[alert]]
name = "failing"
agents = "planner"
when = "failure_rate > 10%"
min_events = 1
notify = ["ops"]
[notify.ops]
command = ["/bin/true"]
"""
_held: list[AgentInstance] = []
"""References that keep leases: the library releases a lease whose instance is garbage-collected."""


def _because() -> str:
    time.sleep(0.003)  # longer than 1 ms, since costs are stored in whole ms
    return "because"


def release(perf: AgentPerf) -> None:
    """Release the leases of `fill`."""
    while _held:
        perf.balancer().release(_held.pop())
