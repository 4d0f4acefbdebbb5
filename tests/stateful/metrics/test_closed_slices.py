"""Closed slices, late samples and repeated flushes, in any order, leave the expected counts in every bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.histogram import bucket_index
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.metrics.series import Rows, merged_rows, read_series
from agentperf_redis.windows import TimeRange
from tests.support.examples import examples
from tests.support.filled import WIDTHS
from tests.support.mutants import alter
from tests.support.servers import Server, new_namespace
from tests.support.slices import Slices, add, open_slices, stored_slices

AGENT = "research"
HOURS = 3
KEPT = Retention(slices_10s=(HOURS + 3) * 3600.0, slices_1m=(HOURS + 3) * 3600.0)
"""Keeps all slices that are read: samples begin at a full hour, at most four hours ago, and windows begin at most 80
minutes before the samples."""
SETTLE_S, MIN_FIELDS, MAX_TAIL = 10, 24, 256
"""The same values as in `flush.lua`."""
PLAIN = ("n", "ok", "err", "sum_us")
_SECONDS = {name: width for width, (name, _) in WIDTHS.items()}


class Sample(NamedTuple):
    """An execution: seconds from the end of the previous execution to its own end, its duration in us, its outcome."""

    after_s: float
    us: int
    outcome: str


class Flush(NamedTuple):
    """One flush of a process.

    Attributes:
        process: the process, 0 or 1.
        after_s: time since the previous flush, s.
        late_s: time from the end of the first sample to the flush, s.
        samples: the samples.
        spread: number of additional samples before `samples`. They end at one time, each in a bucket of its own.
        repeats: how often the flush is sent again, as if its reply had been lost.
    """

    process: int
    after_s: float
    late_s: float
    samples: list[Sample]
    spread: int
    repeats: int


SAMPLES = st.builds(
    Sample,
    st.sampled_from([0.0, 0.5, 4.0, 11.0, 70.0]),
    st.sampled_from([0, 1, 300, 41_000, 42_000, 45_000, 900_000, 2_000_000, 3_600_000_000]),
    st.sampled_from([OK, "err:TimeoutError", "err:a=b |c%20 d", "cancelled"]),
)
FLUSHES = st.builds(
    Flush,
    st.integers(0, 1),
    st.sampled_from([0.2, 1.0, 4.0, 9.0, 10.0, 31.0, 61.0, 1200.0]),
    st.sampled_from([0.0, 0.0, 0.0, 2.0, 12.0, 65.0, 400.0, 4000.0]),
    st.lists(SAMPLES, min_size=1, max_size=8),
    st.sampled_from([0, 0, 5, 15, 25]),
    st.integers(0, 1),
)


class History:
    """Two processes that flush to one namespace, at times within the last three hours, and the expected counts."""

    def __init__(self, backend: Backend, raw: Any) -> None:
        self.backend, self.raw = backend, raw
        seconds, micros = raw.time()
        self.server_s = seconds + micros / 1e6
        self.now = self.start = (self.server_s - HOURS * 3600) // 3600 * 3600
        self.clock = 0.0
        self.buffers = [Buffer(on_first=lambda: None, clock=lambda: self.clock) for _ in range(2)]
        for buffer in self.buffers:
            buffer.synchronise(self.server_s, 0.0)
        self.expected: Slices = {}
        self.last = 0.0

    def flush(self, flush: Flush) -> None:
        self.now += flush.after_s
        at = max(self.start, self.now - flush.late_s)
        buffer = self.buffers[flush.process]
        spread = [Sample(0.0, round(1000 * 1.3**number), OK) for number in range(flush.spread)]
        for sample in spread + flush.samples:
            at = min(at + sample.after_s, self.now)
            self.clock = at - self.server_s
            buffer.record(AGENT, sample.us / 1e6, sample.outcome)
            self._expect(at, sample)
        buffer.aggregate()
        self.clock = 0.0
        for batch in buffer.batches():
            command = commands.flush(
                self.backend.namespace,
                batch,
                now=0.0,
                retention=KEPT,
                firm=True,
                server_ms=round(self.server_s * 1000),
            )
            for _ in range(1 + flush.repeats):
                self.backend.run(command)
            buffer.settled(batch)

    def _expect(self, at: float, sample: Sample) -> None:
        self.last = max(self.last, at)
        fields = {"n": 1, sample.outcome: 1, "sum_us": sample.us, "min_us": sample.us, "max_us": sample.us}
        if sample.outcome.startswith("err:"):
            fields["err"] = 1
        fields[f"h:{bucket_index(sample.us)}" if sample.us else "h:zero"] = 1
        for width, (name, spelt) in WIDTHS.items():
            start = datetime.fromtimestamp(at // width * width, UTC).strftime(spelt)
            add(self.expected.setdefault((name, start), {}), fields)

    def stored(self) -> Slices:
        """Return the stored slices without the times of their samples."""
        found = stored_slices(self.raw, self.backend.namespace, AGENT)
        return {
            slice_: {name: value for name, value in fields.items() if name not in ("first_ms", "last_ms")}
            for slice_, fields in found.items()
        }

    def left_open(self) -> dict[tuple[str, str], int]:
        """Return the slices that are still hashes, with the number of their fields."""
        tag = keys.metrics_tag(self.backend.namespace, keys.metrics_shard(AGENT))
        return {
            (name, start): len(fields)
            for name, _ in WIDTHS.values()
            for start, fields in open_slices(self.raw, tag, name, AGENT).items()
        }

    def must_be_open(self) -> set[tuple[str, str]]:
        """Return the slices that ended less than `SETTLE_S` before the last sample, or have not ended yet."""
        return {slice_ for slice_ in self.expected if self._end(slice_) + SETTLE_S > self.last}

    def should_be_closed(self) -> set[tuple[str, str]]:
        """Return the hashes that should be closed: slices with many fields that are neither too new nor too old."""
        return {
            slice_
            for slice_, size in self.left_open().items()
            if size >= MIN_FIELDS
            and slice_[0] != "10s"
            and self._end(slice_) + SETTLE_S <= self.last
            and self._end(slice_) > self.last - MAX_TAIL * _SECONDS[slice_[0]]
        }

    def _end(self, slice_: tuple[str, str]) -> float:
        name, start = slice_
        width = _SECONDS[name]
        return datetime.strptime(start, WIDTHS[width][1]).replace(tzinfo=UTC).timestamp() + width

    def window(
        self, seconds: int, end: float, *, plain: bool = False, names: Sequence[str] = (AGENT,)
    ) -> dict[str, int]:
        """Return the counters that `commands.read` returns for a window, if it reads the series `names` in one call."""
        shard = keys.metrics_shard(AGENT)
        reply = self.backend.run(
            commands.read(
                self.backend.namespace,
                shard,
                names,
                window_ms=seconds * 1000,
                as_of_ms=round(end * 1000),
                max_exact=-1 if plain else 0,
            )
        )
        counters = reply.counter_sets[AGENT]
        fields = {name: value for name, value in counters.counts.items() if name not in ("first_ms", "last_ms")}
        fields |= {f"h:{index}": value for index, value in counters.buckets.items()}
        return fields | {f"err:{name}": value for name, value in counters.errors.items()}

    def steps(self, seconds: int, names: Sequence[str]) -> Rows:
        """Return the rows of the agent by minutes, if `read_series` reads the series `names` in one call."""
        shard, time = keys.metrics_shard(AGENT), TimeRange(seconds * 1000, round(self.now * 1000))
        reply = self.backend.run(read_series(self.backend.namespace, shard, names, time, 60_000))
        return reply.rows[names.index(AGENT)]

    def expected_window(self, seconds: int, end: float) -> dict[str, int]:
        total: dict[str, int] = {}
        for (name, start), fields in self.expected.items():
            if name == "10s":
                at = self._end((name, start))
                if end - seconds < at <= end:
                    add(total, fields)
        return total


def check(server: Server, flushes: Iterable[Flush]) -> None:
    backend = Backend(server.url, namespace=new_namespace("closed"))
    try:
        with server.client() as raw:
            history = History(backend, raw)
            for flush in flushes:
                if history.now + flush.after_s < history.server_s - 60:
                    history.flush(flush)
            assert history.stored() == history.expected
            assert set(history.must_be_open()) <= set(history.left_open())
            assert not history.should_be_closed()
            collector = MetricsCollector(backend=backend)
            for end in (history.now // 60 * 60 + 60, history.now // 60 * 60 - 1200):
                row = merged_rows(collector.series(AGENT, window="1h", step="1m", as_of=end))
                expected = history.expected_window(3600, end)
                assert (row.tasks, row.errors, row.zeros) == tuple(
                    expected.get(name, 0) for name in ("n", "err", "h:zero")
                )
                found = {f"h:{index}": count for index, count in row.buckets.items()}
                assert found == {name: expected[name] for name in expected if name[:2] == "h:" and name != "h:zero"}
                assert sum(row.error_types.values()) == row.errors
            end = history.now // 10 * 10 + 10
            for seconds, before in ((60, 0), (300, 0), (300, 610), (300, 1230), (3600, 0), (3600, 610), (7200, 40)):
                expected = history.expected_window(seconds, end - before)
                assert history.window(seconds, end - before) == expected
                plain = history.window(seconds, end - before, plain=True)
                assert {name: plain[name] for name in PLAIN if plain[name] or name in expected} == {
                    name: expected[name] for name in PLAIN if name in expected
                }
    finally:
        backend.close()


@examples(10, 300)
def test_any_order_of_flushes_leaves_the_same_histograms(server: Server, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(FLUSHES, min_size=1, max_size=25))
    def run(flushes: list[Flush]) -> None:
        check(server, flushes)

    run()


@pytest.mark.parametrize("minutes", [10, 45])
def test_late_samples_are_counted_beside_closed_slices(server: Server, minutes: int) -> None:
    busy = [Flush(0, 61.0, 0.0, [Sample(0.0, 300, OK)], 25, 0)] * minutes
    late = [
        Flush(1, 20.0, float(late_s), [Sample(0.0, 0, "err:TimeoutError")], 0, 1) for late_s in (100, 400, 760, 2000)
    ]
    check(server, [*busy, *late])
    check(server, [*busy, Flush(1, 1200.0, 0.0, [Sample(0.0, 300, OK)], 25, 0), *late, *busy])


def differences_among_others(server: Server, positions: Iterable[int]) -> set[str]:
    """Return the kinds of reads in which a series with closed slices counts differently if others are read with it.

    Args:
        server: the server.
        positions: positions of the series among 70 series, of which the others have no slices.
    """
    with closing(Backend(server.url, namespace=new_namespace("closed"))) as backend, server.client() as raw:
        history = History(backend, raw)
        for _ in range(70):
            history.flush(Flush(0, 61.0, 0.0, [Sample(0.0, 300, OK)], 25, 0))
        found = set()
        reads: dict[str, Callable[..., Any]] = {
            "plain": partial(history.window, end=history.now, plain=True),
            "full": partial(history.window, end=history.now, plain=False),
            "series": history.steps,
        }
        for seconds, (kind, read) in product((300, 3600, 7200), reads.items()):
            alone = read(seconds, names=[AGENT])
            assert sum(row.tasks for row in alone) > 100 if kind == "series" else alone["n"] > 100
            for position in positions:
                names = [f"none-{number}" for number in range(70)]
                names[position] = AGENT
                if read(seconds, names=names) != alone:
                    found.add(kind)
        return found


def test_series_counts_the_same_among_others(server: Server) -> None:
    assert differences_among_others(server, (0, 31, 32, 69)) == set()


@pytest.mark.thorough
@pytest.mark.servers("valkey")
@pytest.mark.parametrize(
    ("line", "instead", "position"),
    [
        ("if (i - NAMES) % GROUP == 0 then", "if i == NAMES then", 32),
        ("math.min(i + GROUP - 1, #ARGV)", "math.min(i + 1, #ARGV)", 2),
        ("do tiers[ranges[r].tier] = true end", "do break end", 0),
        ("for i = first, last do keys[#keys + 1]", "for i = first, last - 1 do keys[#keys + 1]", 31),
    ],
)
def test_missed_list_of_a_group_fails_the_check(
    server: Server, monkeypatch: pytest.MonkeyPatch, line: str, instead: str, position: int
) -> None:
    alter(monkeypatch, "metrics/read", line, instead)  # this also alters the script metrics/series
    assert differences_among_others(server, [position]) == {"plain", "full", "series"}
