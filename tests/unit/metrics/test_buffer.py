from __future__ import annotations

import threading

import pytest

from agentperf_redis import keys
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics import buffer as module
from agentperf_redis.metrics.accumulator import CANCELLED, MAX_COUNTERS, MAX_RAW, OK, Accumulator, Part, columns
from agentperf_redis.metrics.buffer import MAX_BATCH_ACCUMULATORS, WRITER_KEEP_S, Buffer, FlushBatch
from agentperf_redis.metrics.histogram import micros
from agentperf_redis.metrics.model import OTHER
from agentperf_redis.metrics.retention import Retention


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def buffer(clock: Clock) -> Buffer:
    made = Buffer(on_first=lambda: None, clock=clock)
    made.synchronise(5000.0, clock.now)  # the server's time is 4000 s ahead of our clock
    return made


def pack(buffer: Buffer) -> list[FlushBatch]:
    buffer.announce_next()
    buffer.aggregate()
    return buffer.batches()


def raw_us(accumulator: Accumulator) -> list[int]:
    return [micros(seconds) for _, seconds, _ in columns(accumulator.raw)]


def counts(buffer: Buffer) -> dict[str, int]:
    """Return the counters that the buffer would still send, added up over all series."""
    found: dict[str, int] = {}
    for batch in pack(buffer):
        for packed in batch.accumulators:
            for name, value in packed.accumulator.counts.items():
                found[name] = found.get(name, 0) + value
    return found


def test_samples_are_aggregated_into_counts(buffer: Buffer) -> None:
    buffer.record("research", 2_000_000 / 1e6, OK)
    buffer.record("research", 0 / 1e6, "err:TimeoutError")
    buffer.record("research", 2_000_001 / 1e6, "err")
    buffer.record("research", 5 / 1e6, CANCELLED)

    (batch,) = pack(buffer)
    (packed,) = batch.accumulators

    assert packed.series.name == "research"
    assert packed.accumulator.counts == {
        "n": 4, "ok": 1, "err": 2, "err:TimeoutError": 1, "cancelled": 1, "sum_us": 4_000_006,
        "h:15": 1, "h:16": 1, "h:zero": 1, "h:-282": 1,
    }  # fmt: skip
    assert (packed.accumulator.min_us, packed.accumulator.max_us) == (0, 2_000_001)
    assert raw_us(packed.accumulator) == [2_000_000, 0, 2_000_001, 5]


def test_batch_in_flight_never_changes(buffer: Buffer) -> None:
    buffer.record("research", 1 / 1e6, OK)
    (first,) = pack(buffer)
    buffer.record("research", 1 / 1e6, OK)

    assert pack(buffer) == [first]
    assert first.samples == 1

    buffer.settled(first, 0)
    (second,) = pack(buffer)
    assert (second.seq, second.samples, second.writer) == (first.seq + 1, 1, first.writer)


def test_batch_is_settled_only_once(buffer: Buffer) -> None:
    buffer.record("research", 1 / 1e6, OK)
    (batch,) = pack(buffer)
    buffer.settled(batch, 0)
    buffer.settled(batch, 0)
    assert buffer.delivery_counts()[:2] == (1, 0)
    assert buffer.empty


def test_accumulators_align_with_server_slices(buffer: Buffer, clock: Clock) -> None:
    for timestamp in (1000.0, 1009.99, 1010.0, 1029.0):  # server times: 5000, 5009.99, 5010 and 5029 s
        clock.now = timestamp
        buffer.record("research", 1 / 1e6, OK)
    (batch,) = pack(buffer)
    assert [(packed.accumulator.oldest, packed.accumulator.counts["n"]) for packed in batch.accumulators] == [
        (1000.0, 2),
        (1010.0, 1),
        (1029.0, 1),
    ]


def test_long_outage_is_downsampled_step_by_step(buffer: Buffer, clock: Clock) -> None:
    buffer.record("first", 1 / 1e6, OK)
    pack(buffer)  # this batch stays in flight: it is never settled
    for _ in range(6 * 60 * 5):  # one record every ten seconds for five hours
        clock.now += 10
        buffer.record("first", 1 / 1e6, OK)
        buffer.aggregate()
        buffer.downsample(Retention().ttls)
    # Slices of 10 s reach back 15 minutes, and slices of 1 min reach back 3 hours. The rest is in slices of 1 h.
    assert buffer.waiting_accumulators <= 91 + 181 + 3
    assert buffer.delivery_counts()[:2] == (0, 1801)
    (batch,) = pack(buffer)
    buffer.settled(batch, 0)
    widths = set()
    total = 0
    while batches := pack(buffer):
        for packed in batches[0].accumulators:
            widths.add(packed.width_s)
            total += packed.accumulator.counts["n"]
            assert packed.accumulator.newest - packed.accumulator.oldest < packed.width_s
        buffer.settled(batches[0], 0)
    assert (widths, total) == ({10, 60, 3600}, 1800)


def test_excess_accumulators_are_merged_without_loss(
    buffer: Buffer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ACCUMULATORS", 10)
    for _ in range(40):
        clock.now += 10
        buffer.record("research", 1 / 1e6, OK)
    buffer.aggregate()
    assert buffer.waiting_accumulators == 40
    buffer.downsample(Retention().ttls)
    assert buffer.waiting_accumulators <= 10
    assert buffer.delivery_counts()[1] == 40


def test_raw_samples_waiting_in_an_outage_are_bounded(
    buffer: Buffer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_RAW", 2500)
    for _ in range(4):
        clock.now += 10
        for number in range(600):
            for name in ("a", "b", "c"):
                buffer.record(name, number / 1e6, OK)
    buffer.aggregate()
    buffer.downsample(Retention().ttls)
    kept = [packed for shard in buffer._shards.values() for packed in shard.waiting.values()]
    raw = sum(packed.accumulator.raw_count for packed in kept)
    assert 2000 < raw <= 2500
    assert sum(packed.accumulator.counts["n"] for packed in kept) == 4 * 3 * 600
    assert buffer.delivery_counts()[4] == 4 * 3 * 600 - raw, "dropped samples are counted"
    newest = max(packed.accumulator.newest for packed in kept)
    assert all(packed.accumulator.raw_count == 600 for packed in kept if packed.accumulator.newest == newest)


def test_batch_bounds_its_accumulators(buffer: Buffer, clock: Clock) -> None:
    for _ in range(MAX_BATCH_ACCUMULATORS + 5):
        clock.now += 10
        buffer.record("research", 1 / 1e6, OK)
    (batch,) = pack(buffer)
    assert len(batch.accumulators) == MAX_BATCH_ACCUMULATORS
    buffer.settled(batch, 0)
    (batch,) = pack(buffer)
    assert len(batch.accumulators) == 5


def test_batch_bounds_its_raw_samples(buffer: Buffer) -> None:
    names = [name for name in (f"agent-{number}" for number in range(500)) if keys.metrics_shard(name) == 3][:5]
    for name in names:
        for _ in range(MAX_RAW):
            buffer.record(name, 0.5, OK)
    (batch,) = pack(buffer)
    assert len(batch.accumulators) == module.MAX_BATCH_SAMPLES / MAX_RAW
    sent = batch.samples
    while batches := pack(buffer):
        buffer.settled(batches[0], 0)
        sent += 0 if batches[0] is batch else batches[0].samples
    assert sent == 5 * MAX_RAW


def test_raw_samples_are_bounded_and_drops_counted(buffer: Buffer, clock: Clock) -> None:
    for us in range(MAX_RAW + 500):
        buffer.record("research", us / 1e6, OK)
    (batch,) = pack(buffer)
    accumulator = batch.accumulators[0].accumulator
    assert accumulator.counts["n"] == MAX_RAW + 500
    assert raw_us(accumulator) == list(range(500, MAX_RAW + 500)), "the newest are kept"
    assert buffer.delivery_counts()[4] == 500
    buffer.settled(batch, 0)

    clock.now += 1
    for us in range(1000, 0, -1):
        buffer.record("research", us / 1e6, OK)
    (batch,) = pack(buffer)
    kept = set(raw_us(batch.accumulators[0].accumulator))
    assert kept == set(range(1, 51)) | set(range(951, 1001)), (
        "a busy series sends the newest 50 per second and the slowest"
    )


def test_series_beyond_the_limit_are_counted_together(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 3)
    for number in range(10):
        buffer.record(f"agent-{number}", 1 / 1e6, OK)
    by_name = {
        packed.series.name: packed.accumulator.counts["n"] for batch in pack(buffer) for packed in batch.accumulators
    }
    assert by_name == {"agent-0": 1, "agent-1": 1, "agent-2": 1, OTHER: 7}


def test_accumulator_bounds_its_error_types(buffer: Buffer) -> None:
    for number in range(5000):
        buffer.record("research", 1 / 1e6, f"err:E{number}")
    (batch,) = pack(buffer)
    found = batch.accumulators[0].accumulator.counts
    errors = {name: count for name, count in found.items() if name.startswith("err:")}
    assert sum(errors.values()) == found["err"] == 5000
    assert len(errors) <= MAX_COUNTERS


def test_batch_unanswered_too_long_gets_a_new_writer(buffer: Buffer, clock: Clock) -> None:
    buffer.record("research", 1 / 1e6, OK)
    (batch,) = pack(buffer)
    writer = batch.writer
    buffer.unanswered(batch, clock.now)
    clock.now += WRITER_KEEP_S / 2
    assert pack(buffer)[0].writer == writer
    clock.now += WRITER_KEEP_S / 2
    (again,) = pack(buffer)
    assert again is batch
    assert again.writer != writer
    assert buffer.delivery_counts()[3] == 1, "and is reported as uncertain"


def test_corrupt_series_leaves_the_rest_of_its_batch(buffer: Buffer) -> None:
    # Both agents belong to shard 2.
    buffer.record("research", 1 / 1e6, OK)
    buffer.record("a b{1}", 1 / 1e6, OK)
    buffer.record("a b{1}", 1 / 1e6, OK)
    (batch,) = pack(buffer)
    number = batch.seq

    assert buffer.refused(batch, "agents") == 0
    assert buffer.refused(batch, "w:abc") == 0
    assert buffer.refused(batch, "1m:2026-11-22T16:45:a%20b%7B1%7D") == 2
    assert [packed.series.name for packed in batch.accumulators] == ["research"]
    assert batch.seq > number, "a late copy of the whole batch must not replace the rest"

    assert buffer.refused(batch, "total:research") == 1
    assert buffer.empty
    assert buffer.delivery_counts()[:3] == (0, 0, 3)


@pytest.mark.parametrize("name", ["", "a" * 201, "a\n", "\ud800", None, 3, ["x"], {}, b"x"])
def test_invalid_names_are_rejected(buffer: Buffer, name: str) -> None:
    with pytest.raises(InvalidArgument, match="agent_name"):
        buffer.record(name, 1 / 1e6, OK)
    assert buffer.empty


def test_reset_empties_the_buffer_and_renames_the_writer(buffer: Buffer) -> None:
    buffer.record("research", 1 / 1e6, OK)
    writer = buffer.writer
    buffer.reset()
    assert buffer.empty
    assert buffer.writer != writer


def test_first_record_after_a_flush_calls_on_first(clock: Clock) -> None:
    calls: list[float] = []
    buffer = Buffer(on_first=lambda: calls.append(clock.now), clock=clock)
    for name in ("a", "b", "a"):
        buffer.record(name, 1 / 1e6, OK)
    assert len(calls) == 1
    pack(buffer)
    buffer.record("b", 1 / 1e6, OK)
    assert len(calls) == 2


def test_nested_record_does_not_deadlock(clock: Clock) -> None:
    """A signal handler or a garbage-collected tracked generator may record in the middle of another record."""
    nested: list[int] = []

    def on_first() -> None:
        if not nested:
            nested.append(1)
            made.record("inner", 1 / 1e6, OK)

    made = Buffer(on_first=on_first, clock=clock)
    thread = threading.Thread(target=lambda: made.record("outer", 1 / 1e6, OK), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert counts(made)["n"] == 2


def test_concurrent_threads_lose_no_records() -> None:
    buffer = Buffer(on_first=lambda: None)
    sent = 0

    def work(number: int) -> None:
        for turn in range(5000):
            buffer.record(f"agent-{(number + turn) % 7}", turn / 1e6, OK)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for batch in pack(buffer):
            sent += batch.samples
            buffer.settled(batch, 0)
    while batches := pack(buffer):
        for batch in batches:
            sent += batch.samples
            buffer.settled(batch, 0)
    assert sent == 20_000
    assert buffer.delivery_counts()[0] == 20_000


def test_full_sample_buffer_is_aggregated_while_recording(buffer: Buffer) -> None:
    for _ in range(module.MAX_BUFFERED_SAMPLES - 1):
        buffer.record("research", 0.5, OK)
    assert buffer.waiting_accumulators == 0
    buffer.record("research", 0.5, OK)
    assert buffer.waiting_accumulators == 1


def test_spans_and_measures_share_their_agents_shard(buffer: Buffer) -> None:
    buffer.record(Part("research", ("plan", "tool:a/b")), 0.5, OK, 0.25)
    buffer.record(Part("research", (), "ttft"), 0.5, OK)
    buffer.add("research", {"tok_in": 5})
    (batch,) = pack(buffer)
    counts_of = {packed.series.name: packed.accumulator.counts for packed in batch.accumulators}
    assert {name: (found["n"], found["self_us"], found["tok_in"]) for name, found in counts_of.items()} == {
        "research/plan/tool%3Aa%2Fb": (1, 250_000, 0),
        "research#ttft": (1, 0, 0),
        "research": (0, 0, 5),
    }
