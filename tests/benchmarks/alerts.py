"""Benchmarks of alerts: a replay of many rules over a day, and the evaluation of many rules."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from agentperf_redis import AgentPerf, Retention
from tests.benchmarks.measure import Bench, Row
from tests.support.alert_rules import History

RULES, AGENTS, HOURS = 100, 100, 24
REPLAY_GOAL_S = 60.0
_WINDOWS = ("5m", "10m", "15m", "30m", "1h")
_CONDITIONS = (
    "p50 > {:.1f}s",
    "p95 > {:.1f}s",
    "p99 > {:.1f}s",
    "avg > {:.1f}s",
    "max > {:.1f}s",
    "failure_rate > {:.0f}%",
    "success_rate < 9{:.0f}%",
    "errors > {:.0f}",
    "tasks < {:.0f}",
    "throughput < {:.0f}/min",
)


def rules(count: int = RULES) -> str:
    """Return a file of rules on all agents, with five windows and ten measures."""
    return "".join(
        f'[[alert]]\nname = "rule {number}"\nagents = "*"\nwhen = "{_CONDITIONS[number % 10].format(1 + number / 20)}"\n'
        f'window = "{_WINDOWS[number // 10 % 5]}"\nfor = "2m"\nmin_events = 5\n'
        for number in range(count)
    )


def fill(history: History, agents: int = AGENTS, hours: int = HOURS) -> None:
    """Record three executions a minute of each agent, with a bad quarter of an hour now and then."""
    source = random.Random(1)
    names = [f"agent-{number:03d}" for number in range(agents)]
    bad = dict.fromkeys(names, 0)
    for minute, at in enumerate(history.minutes(hours * 60, 1)):
        for name in names:
            if source.random() < 1 / 400:
                bad[name] = minute + 15
            slower, failing = (4.0, 0.3) if minute < bad[name] else (1.0, 0.005)
            for _ in range(3):
                failed = source.random() < failing
                duration = source.lognormvariate(0, 0.5) * slower
                history.record(name, at - 30, duration, failed=int(failed), succeeded=int(not failed))
        if minute % 60 == 59:
            history.count()
    history.count()


def processor_s(bench: Bench) -> float:
    """Return the seconds of processor time that this process and the server have used. Nothing else takes time here."""
    with bench.client() as client:
        used = client.info("cpu")
    return time.process_time() + float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def rows(bench: Bench) -> Iterator[Row]:
    """Yield the rows about a replay and about live evaluation."""
    with AgentPerf(bench.url, namespace="alerts") as perf:
        history = History(perf.backend, Retention(slices_1m=2 * 86_400.0))
        fill(history)
        start, start_cpu = time.perf_counter(), processor_s(bench)
        found = perf.alerts.test(text=rules(), since=f"{HOURS}h", as_of=history.now)
        taken, taken_cpu = time.perf_counter() - start, processor_s(bench) - start_cpu
        assert found.judged == RULES * AGENTS * HOURS * 60
        yield Row(
            f"replay of {RULES} rules, {AGENTS} agents, {HOURS} h",
            f"{taken_cpu:.1f} s",
            f"{found.judged / 1e6:.1f} M judgements, elapsed {taken:.0f} s",
            None,
            f"<= {REPLAY_GOAL_S:.0f} s",
            taken_cpu <= REPLAY_GOAL_S,
        )
        perf.alerts.deploy(text=rules())
        taken_once = []
        for at in history.minutes(5, 0):
            start_cpu = processor_s(bench)
            done = perf.alerts.evaluate(as_of=at)
            taken_once.append(processor_s(bench) - start_cpu)
            assert len(done.rules) == RULES
        yield Row(
            f"evaluation of {RULES} rules on {AGENTS} agents",
            f"{sorted(taken_once)[len(taken_once) // 2] * 1000:.0f} ms",
            "once a minute, shared by all evaluators",
            None,
            "",
            None,
        )
