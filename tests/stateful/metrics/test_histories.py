"""Random histories of two collectors, which stand for two processes, follow the rules of the in-memory version."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from agentperf_redis.backend import Backend
from agentperf_redis.metrics.client import MetricsCollector
from tests.support.examples import examples
from tests.support.servers import Server, new_namespace

AGENTS = st.sampled_from(["research", "writer", "a b{1}", "x/y#z"])
TIMES = st.integers(0, 20_000_000).map(lambda us: us / 1e6)
ERRORS = st.sampled_from([None, "", "TimeoutError", "ValueError", "a|b:c"])


class Reference:
    """Counts, times and percentiles, computed as the in-memory version of the library computes them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.failures = 0
        self.errors: dict[str, int] = defaultdict(int)

    def update(self, seconds: float, success: bool, error: str | None) -> None:
        self.times.append(seconds)
        if not success:
            self.failures += 1
            if error:
                self.errors[error] += 1

    def check(self, found: Any) -> None:
        count = len(self.times)
        ordered = sorted(self.times)
        assert found.task_count == count
        assert (found.failure_count, found.success_count) == (self.failures, count - self.failures)
        assert found.error_types == dict(self.errors)
        assert math.isclose(found.total_execution_time, sum(self.times), abs_tol=1e-6)
        assert (found.min_execution_time, found.max_execution_time) == (ordered[0], ordered[-1])
        assert sorted(found.execution_times) == ordered
        for share, percentile in (
            (0.5, found.p50_execution_time),
            (0.95, found.p95_execution_time),
            (0.99, found.p99_execution_time),
        ):
            assert percentile == ordered[int(count * share)]
        assert sum(found.buckets.values()) + found.zeros == count


class Metrics(RuleBasedStateMachine):
    """Two collectors with separate backends, which stand for two processes."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        namespace = new_namespace("stateful")
        self.backends = [Backend(self.url, namespace=namespace) for _ in range(2)]
        self.collectors = [MetricsCollector(backend=backend) for backend in self.backends]
        self.model: dict[str, Reference] = {}

    @rule(
        who=st.integers(0, 1),
        agent=AGENTS,
        times=st.lists(TIMES, min_size=1, max_size=20),
        success=st.booleans(),
        error=ERRORS,
    )
    def record(self, who: int, agent: str, times: list[float], success: bool, error: str | None) -> None:
        for seconds in times:
            self.collectors[who].record_execution(agent, seconds, success, error)
            self.model.setdefault(agent, Reference()).update(seconds, success, error)

    @rule(who=st.integers(0, 1))
    def flush(self, who: int) -> None:
        assert self.collectors[who].flush()

    @rule(who=st.integers(0, 1), window=st.sampled_from([None, "5m", "1h", "1d", "30d"]))
    def read_all(self, who: int, window: str | None) -> None:
        self.collectors[1 - who].flush()
        found = self.collectors[who].snapshots(window=window)
        assert set(found) == set(self.model)
        for agent, expected in self.model.items():
            expected.check(found[agent])

    @rule(who=st.integers(0, 1), agent=AGENTS)
    def read_one(self, who: int, agent: str) -> None:
        self.collectors[1 - who].flush()
        found = self.collectors[who].get_or_create_metrics(agent)
        if agent in self.model:
            self.model[agent].check(found)
        else:
            assert found.task_count == 0

    @rule(who=st.integers(0, 1))
    def summarise(self, who: int) -> None:
        self.collectors[1 - who].flush()
        summary = self.collectors[who].summary()
        assert summary.total_tasks == sum(len(each.times) for each in self.model.values())
        scores = {
            agent: (len(each.times) - each.failures) / len(each.times) / (sum(each.times) / len(each.times) + 1)
            for agent, each in self.model.items()
        }
        assert {ranking.agent for ranking in summary.rankings} == set(scores)
        for ranking in summary.rankings:
            assert math.isclose(ranking.score, scores[ranking.agent], abs_tol=1e-9)
        assert list(summary.rankings) == sorted(summary.rankings, key=lambda ranking: -ranking.score)

    @invariant()
    def nothing_is_lost(self) -> None:
        for collector in self.collectors:
            state = collector.delivery()
            assert state.recorded == state.counted + state.pending
            assert (state.dropped, state.uncertain, state.samples_dropped, state.other) == (0, 0, 0, 0)

    def teardown(self) -> None:
        for backend in self.backends:
            backend.close()


@examples(8, 60)
def test_random_histories_match_the_in_memory_version(server: Server, examples: int) -> None:
    machine = type("Machine", (Metrics,), {"url": server.url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
