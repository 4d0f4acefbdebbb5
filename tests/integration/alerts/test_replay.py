"""A replay of rules over a history finds the same firings as a live evaluation of this history."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, Retention, keys
from agentperf_redis.alerts.model import Replay
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands
from agentperf_redis.balancer import history as pool_history
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.layouts import layouts_of
from agentperf_redis.history import read_history
from tests.support.alert_rules import MINUTE, History, evaluated, firings
from tests.support.calls import Call
from tests.support.mutants import alter
from tests.support.servers import Raw, Server, wait_until

RULES = """
[[alert]]
name = "slow"
agents = "*"
when = "p95 > 2s"
resolve = "p95 < 1.5s"
window = "5m"
for = "2m"
keep_firing_for = "3m"

[[alert]]
name = "failing"
agents = "a*"
when = "failure_rate > 20%"
window = "10m"
min_events = 10

[[alert]]
name = "idle"
agents = "*"
when = "tasks < 3"
window = "15m"
for = "5m"

[[alert]]
name = "silent"
agents = "*"
when = "avg > 1h"
window = "6m"
no_data = "alert"
for = "4m"

[[alert]]
name = "longest"
agents = "b*"
when = "max >= 9s"
window = "7m"

[[alert]]
name = "busy"
agents = "*"
when = "throughput > 6/min"
window = "20m"

[[alert]]
name = "median"
agents = "*"
when = "p50 < 900ms"
window = "1h"

[[slo]]
name = "succeeds"
agents = "*"
objective = "95%"

[[slo]]
name = "is fast"
agents = "*"
objective = "95% under 3s"
"""


def generate(history: History, minutes: int, agents: tuple[str, ...], seed: int) -> None:
    """Record executions that fail, slow down and pause from time to time."""
    source = random.Random(seed)
    moods = dict.fromkeys(agents, (0.5, 0.0, 4))
    for at in history.minutes(minutes, 1):
        for agent in agents:
            if source.random() < 0.04:
                moods[agent] = source.choice(
                    [(0.5, 0.0, 4), (3.0, 0.0, 4), (0.6, 0.5, 6), (1.0, 0.1, 0), (9.5, 0.0, 9)]
                )
            median, failing, count = moods[agent]
            for _ in range(count):
                failed = source.random() < failing
                history.record(
                    agent,
                    at - 30,
                    source.lognormvariate(0, 0.4) * median,
                    failed=int(failed),
                    succeeded=int(not failed),
                )
    history.count()


def found_by(replay: Replay) -> list[tuple[str, str, float, float | None]]:
    return sorted(
        ((each.rule, each.target, each.start, each.end) for each in replay.firings),
        key=lambda each: (each[2], each[0], each[1]),
    )


def compare(perf: AgentPerf, backend: Backend, hours: float, agents: tuple[str, ...], retention: Retention) -> int:
    history = History(backend, retention)
    minutes = round(hours * 60)
    generate(history, minutes + 60, agents, seed=1)
    perf.alerts.deploy(text=RULES)
    live = firings(evaluated(perf, history.minutes(minutes - 1, 0)))
    # The replay must end at least two seconds before the server's time, because the records of the last two seconds may
    # not have arrived yet.
    wait_until(lambda: history.server_time() > history.now + 2, "the end of the last window")
    replay = perf.alerts.test(text=RULES, since=minutes * MINUTE, as_of=history.now)
    assert replay.coarse == ()
    assert found_by(replay) == live
    return len(live)


@pytest.mark.thorough
def test_replay_names_the_firings_of_the_live_evaluation(perf: AgentPerf, backend: Backend) -> None:
    assert compare(perf, backend, 0.7, ("a1", "b1"), Retention()) > 5


@pytest.mark.thorough
@pytest.mark.servers("valkey")  # the test takes half a minute on each kind of server
@pytest.mark.waits
def test_replay_of_a_day_names_the_firings_of_the_live_evaluation(perf: AgentPerf, backend: Backend) -> None:
    kept = Retention(slices_1m=5 * 86_400.0)
    assert compare(perf, backend, 24.0, ("a1", "b1"), kept) > 30


def test_replay_of_short_windows_uses_narrow_slices(perf: AgentPerf, backend: Backend) -> None:
    history = History(backend)
    for number in range(60):
        at = history.now - 600 + 10 * number
        history.record("planner", at, 0.5, failed=5 if 20 <= number < 30 else 0, succeeded=5)
    history.count()
    text = '[[alert]]\nname = "failing"\nagents = "planner"\nwhen = "errors > 3"\nwindow = "20s"\nfor = "20s"'
    perf.alerts.deploy(text=text)
    times = [history.now - 500 + 10 * number for number in range(50)]
    live = firings(evaluated(perf, times))
    replay = perf.alerts.test(text=text, since=510, as_of=history.now - 10)
    assert found_by(replay) == live
    assert len(live) == 1


def test_replay_says_where_only_wide_slices_are_left(perf: AgentPerf, backend: Backend, call: Call) -> None:
    history = History(backend)
    for hours in range(30, 0, -1):
        history.record("planner", history.now - 3600 * hours, 3.0 if 10 <= hours <= 12 else 0.5, succeeded=30)
    history.count()
    text = '[[alert]]\nname = "slow"\nagents = "planner"\nwhen = "p95 > 2s"'
    replay = call(perf.alerts, "test", text=text, since="24h")
    (firing,) = replay.firings
    assert firing.rule == "slow"
    assert firing.end is not None
    assert firing.end - firing.start == pytest.approx(3 * 3600, abs=3600)
    assert len(replay.coarse) == 1
    assert "only slices wider than the interval of evaluation are left" in replay.coarse[0]
    assert replay.judged > 100


def test_rules_on_caches_and_pools_are_replayed(perf: AgentPerf, backend: Backend, raw: Raw, namespace: str) -> None:
    perf.cache("answers", max_size=5).put("a", 1)
    perf.balancer().register_instance(AgentInstance("c1", "coder"))
    history = History(backend)
    cache = keys.cache(namespace, "cache", "answers").history
    pool = keys.pool(namespace, "coder").history
    for at in history.minutes(60, 1):
        start_ms, bad = round(at * 1000), 20 <= (history.now - at) / MINUTE < 30
        slot = f"1m:{start_ms // 60_000 % 180}"
        hits, misses = (0, 50) if bad else (50, 0)
        raw.hset(cache, slot, f"at={start_ms} samples=6 hits={hits} misses={misses} evictions=0 size=1 bytes=5")
        raw.hset(pool, slot, f"at={start_ms} samples=6 waiters=9 last_waiters={9 * bad} last_capacity=1")
    text = (
        '[[alert]]\nname = "misses"\ncache = "ans*"\nwhen = "hit_rate < 50%"\nwindow = "5m"\n'
        '[[alert]]\nname = "queue"\npool = "*"\nwhen = "waiters > 2"\nfor = "2m"\n'
    )
    replay = perf.alerts.test(text=text, since="50m", as_of=history.now - 10 * MINUTE)
    start = history.now - 30 * MINUTE
    assert found_by(replay) == [
        ("misses", "answers", start + 4 * MINUTE, start + 14 * MINUTE),
        ("queue", "coder", start + 4 * MINUTE, start + 12 * MINUTE),
    ]
    assert [sentence.partition(":")[0] for sentence in replay.coarse] == ["queue"], (
        "ten seconds are kept for 15 minutes"
    )


POOL_RULES = "".join(
    f'[[alert]]\nname = "{when}"\npool = "coder"\nwhen = "{when}"\n'
    for when in ("load > 300", "load > 50%", "healthy < 5", "unhealthy > 2", "waiters > 2", "overdue > 5")
)
NO_INSTANCE = frozenset({"no instance has this label"})


class PoolWorld:
    """A pool whose state changes at random. `sample` keeps samples of it, and `store` stores them as a past history."""

    def __init__(self, perf: AgentPerf, raw: Raw, shards: int) -> None:
        self.lb, self._backend, self._raw = perf.balancer(), perf.backend, raw
        if shards > 1:
            self.lb.configure_pool("coder", shards=shards)
        for number in range(7):
            self.lb.register_instance(AgentInstance(f"c{number}", "coder", max_capacity=120))
        self.shards = layouts_of(perf.backend).of(Pool.of(perf.backend.namespace, "coder")).shards
        self.source = random.Random(shards)
        self.samples: list[list[dict[str, int]]] = []
        self._leased: list[AgentInstance] = []
        self._waiters: list[tuple[Pool, str]] = []

    def change(self) -> None:
        """Change what the rules watch. An expired lease stays in the pool until the next sample or evaluation."""
        lb, source, shard = self.lb, self.source, self.source.choice(self.shards)
        match source.choice((0, 0, 1, 2, 3, 4, 4, 5)):
            case 0:
                self._leased += lb.acquire_many("coder", source.randint(100, 400), ttl=600)
            case 1:
                source.shuffle(self._leased)
                lb.release_many([self._leased.pop() for _ in range(len(self._leased) // 2)])
            case 2:
                for number in source.sample(range(7), 3):
                    lb.mark_unhealthy("coder", f"c{number}")
            case 3:
                for number in source.sample(range(7), 5):
                    lb.mark_healthy("coder", f"c{number}")
                lb.drain("coder", f"c{source.randrange(7)}")
            case 4:
                self._waiters.append((shard, f"@waiter-{len(self._waiters)}-{source.random()}"))
                options: Any = {"ttl_ms": 600_000, "live_ms": 600_000, "boost_ms": 0, "position": "-"}
                self._backend.run(commands.wait(*self._waiters[-1], require=NO_INSTANCE, **options))
            case 5:
                if self._waiters:
                    self._backend.run(commands.release(*self._waiters.pop()))
                for each in self.shards:
                    held = [name for name in self._raw.zrange(each.keys.due, 0, -1) if name.startswith(b"@")]
                    for name in held:
                        self._raw.zadd(each.keys.due, {name: 1})

    def sample(self) -> None:
        """Sample all shards, then restore them: sampling ends expired leases that an evaluation must still find."""
        found = []
        for shard in self.shards:
            names = [key for name, key in shard.keys._asdict().items() if name != "tag"]
            dumped = {name: self._raw.dump(name) for name in names}
            self._raw.delete(shard.keys.history)
            self._backend.run(pool_history.sample(shard))
            slices = self._backend.run(read_history(shard.keys.history)).slices
            found.append(dict(next(iter(slices.values()), {})))
            # Replace each key in one step. If a key were absent for a moment, this process would register its instances
            # again.
            for name, dump in dumped.items():
                if dump is None:
                    self._raw.delete(name)
                else:
                    self._raw.restore(name, 0, dump, replace=True)
        self.samples.append(found)

    def store(self, times: list[float]) -> None:
        """Store each round of samples as the history of the minute that ends at one of the times."""
        for shard in self.shards:
            self._raw.delete(shard.keys.history)
        for at, found in zip(times, self.samples, strict=True):
            start_ms = round(at * 1000) - 60_000
            for shard, sample in zip(self.shards, found, strict=True):
                words = " ".join(f"{name}={value}" for name, value in sample.items())
                if words:
                    self._raw.hset(shard.keys.history, f"1m:{start_ms // 60_000 % 180}", f"at={start_ms} {words}")


@pytest.mark.thorough
@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("shards", [1, 4])
def test_replay_of_a_pool_names_the_live_firings(
    perf: AgentPerf, backend: Backend, server: Server, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A waiter of `PoolWorld` stays in the queue for ten minutes. So even in a slow test, no waiter leaves between a
    # sample and an evaluation. But the script `sample` may move a waiter's timer to LIVE_MS from now. In the script,
    # LIVE_MS is three seconds, so this test raises LIVE_MS to an hour.
    limits = "local MAX_TTL_MS, CLAIM_MS, LIVE_MS = 86400000, 3000, "
    alter(monkeypatch, "balancer/sample", limits + "3000", limits + "3600000")
    history = History(backend)
    times = history.minutes(90, 20)
    with server.client(decode_responses=False) as raw:
        world = PoolWorld(perf, raw, shards)
        perf.alerts.deploy(text=POOL_RULES)
        live = []
        for at in times:
            world.change()
            world.sample()
            live += evaluated(perf, [at])
        world.store(times)
    replay = perf.alerts.test(text=POOL_RULES, since=(times[-1] - times[0]) + 30, as_of=times[-1])
    assert found_by(replay) == firings(live)
    assert {rule for rule, *_ in firings(live)} == {rule.name for rule in read_rules(POOL_RULES).rules}


def test_replay_without_data_fires_nothing(perf: AgentPerf, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(RULES)
    replay = perf.alerts.test(file)
    assert (replay.firings, replay.judged) == ((), 0)
    assert replay.interval.seconds == pytest.approx(86_400.0)


def test_replay_up_to_the_present_begins_where_it_was_asked_to(perf: AgentPerf, backend: Backend) -> None:
    """The replay ends two seconds before the present, because the latest records may not have arrived yet."""
    now = History(backend).server_time()
    replay = perf.alerts.test(text=RULES, since=600, as_of=now)
    assert replay.interval.start == pytest.approx(now - 600, abs=0.002)
    assert replay.interval.end < now
