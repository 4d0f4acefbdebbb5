"""Faults between a worker and the server change no count. Each test injects a fault and compares the counts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.errors import AgentPerfError, BackendFull, BackendUnavailable, CorruptState
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.script import Script
from tests.support.calls import Call
from tests.support.mutants import without_sequence_check
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector, hurry


def warm(collector: MetricsCollector) -> None:
    """Count one execution of the agent `warm`. The server then knows the script, and the next flush is one request."""
    collector.record_execution("warm", 0.001, True)
    assert collector.flush()


@pytest.mark.parametrize("fault", ["reset_after_reply", "half_reply"])
def test_lost_reply_never_counts_twice(
    proxy: Proxy, connect: Callable[..., Backend], call: Call, raw: Raw, fault: str
) -> None:
    collector = MetricsCollector(backend=connect(proxy.url))
    warm(collector)
    lost = getattr(proxy, fault)(only=commands.FLUSH)
    for _ in range(7):
        collector.record_execution("research", 0.5, False, "TimeoutError")

    assert call(collector, "flush")

    lost.wait()
    assert proxy.count(commands.FLUSH) >= 3
    metrics = call(collector, "get_or_create_metrics", "research")
    assert (metrics.task_count, metrics.failure_count, metrics.error_types) == (7, 7, {"TimeoutError": 7})
    assert len(metrics.execution_times) == 7
    assert collector.delivery().counted == 8


def test_missing_sequence_check_counts_twice(
    proxy: Proxy, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check of sequence numbers, a lost reply counts twice, so the test above can fail."""
    monkeypatch.setattr(commands, "FLUSH", without_sequence_check())
    collector = MetricsCollector(backend=connect(proxy.url))
    warm(collector)
    lost = proxy.reset_after_reply(only=commands.FLUSH)
    collector.record_execution("research", 0.5, True)
    collector.flush()
    lost.wait()
    assert collector.metrics["research"].task_count == 2


def test_batch_without_reply_is_sent_again(
    proxy: Proxy, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    backend = connect(proxy.url)
    collector = MetricsCollector(backend=backend)
    warm(collector)
    hurry(backend, 0.3)
    lost = proxy.swallow(only=commands.FLUSH, times=100)
    collector.record_execution("research", 0.5, True)
    with pytest.raises(BackendUnavailable) as caught:
        collector.flush()
    assert caught.value.outcome == "unknown"
    lost.wait()
    collector.record_execution("research", 0.5, True)  # this record joins the next batch
    assert collector.delivery().pending == 2
    proxy.clear()
    hurry(backend, 5.0)

    assert collector.flush()

    assert collector.metrics["research"].task_count == 2
    delivery = collector.delivery()
    assert (delivery.recorded, delivery.counted, delivery.pending, delivery.last_error) == (3, 3, 0, None)


def test_late_batch_copy_changes_nothing(
    proxy: Proxy, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    collector = MetricsCollector(backend=connect(proxy.url))
    warm(collector)
    held = proxy.hold(only=commands.FLUSH)
    collector.record_execution("research", 0.5, True)
    assert collector.flush(), "sent again at once, because the first connection broke"
    collector.record_execution("research", 0.5, True)
    assert collector.flush()
    reply = held.deliver()
    assert reply.startswith(b"*4\r\n:0\r\n"), "the script replies that it is a repetition"
    assert collector.metrics["research"].task_count == 2


def test_outage_delays_counts_and_loses_none(
    proxy: Proxy, connect: Callable[..., Backend], call: Call, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    backend = connect(proxy.url)
    collector = MetricsCollector(backend=backend)
    warm(collector)
    hurry(backend, 0.2)
    proxy.close_port()
    for _ in range(5):
        collector.record_execution("research", 0.5, True)
        with pytest.raises(BackendUnavailable):
            call(collector, "flush")
    with pytest.raises(BackendUnavailable):
        call(collector, "get_all_metrics")
    delivery = collector.delivery()
    assert (delivery.recorded, delivery.counted, delivery.pending) == (6, 1, 5)
    assert delivery.last_error is not None
    assert "nothing was applied" in delivery.last_error

    proxy.open_port()
    wait_until(lambda: collector.delivery().pending == 0, "the background flush")
    hurry(backend, 5.0)
    assert call(collector, "get_or_create_metrics", "research").task_count == 5
    failed = [record for record in caplog.records if "flushing metrics failed" in record.message]
    assert len(failed) == 1, "logged once, at the start of the outage"
    wait_until(lambda: "flushing metrics works again" in caplog.text, "the warning that the outage is over")


def test_flush_in_an_outage_respects_its_timeout(proxy: Proxy, connect: Callable[..., Backend]) -> None:
    backend = connect(proxy.url)
    collector = MetricsCollector(backend=backend)
    warm(collector)
    hurry(backend, 1.0)
    proxy.go_silent()
    collector.record_execution("research", 0.5, True)
    with StallDetector() as stalls:
        start = time.monotonic()
        assert not collector.flush(timeout=0.1)
        assert stalls.own(start, time.monotonic()) < 0.9
    proxy.speak_again()
    wait_until(lambda: collector.delivery().pending == 0, "the server to be reached again")


def test_full_server_rejects_a_whole_flush_and_accepts_later(
    own_server: Server, connect: Callable[..., Backend]
) -> None:
    collector = MetricsCollector(backend=connect(own_server.url))
    warm(collector)
    with own_server.client() as raw:
        before = raw.dbsize()
        raw.config_set("maxmemory", 1)
        collector.record_execution("research", 0.5, True)
        with pytest.raises(BackendFull):
            collector.flush()
        assert raw.dbsize() == before
        assert collector.metrics["warm"].task_count == 1, "reading works on a full server"
        raw.config_set("maxmemory", 0)
    assert collector.flush()
    assert collector.metrics["research"].task_count == 1


def state(raw: Raw, namespace: str) -> dict[str, bytes]:
    return {key: raw.dump(key) for key in raw.keys(f"{namespace}:*")}


@pytest.mark.parametrize("part", ["agents", "settings", "total", "latest", "slow", "10s", "1m", "1h", "1d"])
def test_wrong_key_type_is_named_and_nothing_written(
    backend: Backend, raw: Raw, namespace: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The agents `bad` and `good` belong to the same shard.
    names = [name for name in (f"agent-{number}" for number in range(1000)) if keys.metrics_shard(name) == 3]
    bad, good = names[:2]
    collector = MetricsCollector(backend=backend)
    tag = keys.metrics_tag(namespace, 3)
    collector.record_execution(bad, 0.5, True)
    collector.flush()
    if part in ("agents", "settings"):
        poisoned = [f"{tag}:{part}"]
        raw.delete(*poisoned)
    else:
        poisoned = [key for key in raw.keys(f"{tag}:{part}:*") if key.endswith(bad)]
        raw.delete(*poisoned)
        if part == "10s":  # damage the current slice and the next slice
            now = time.time() // 10 * 10
            poisoned = [
                f"{tag}:10s:{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now + more))}:{bad}" for more in (0, 10)
            ]
    for key in poisoned:
        raw.set(key, "foreign data")
    before = state(raw, namespace)
    for _ in range(3):
        collector.record_execution(bad, 0.5, True)

    with pytest.raises(CorruptState) as caught:
        collector.flush()

    assert caught.value.key in poisoned
    assert caught.value.found == "a string"
    assert state(raw, namespace) == before
    delivery = collector.delivery()
    assert delivery.recorded == delivery.counted + delivery.pending + delivery.dropped == 4
    if part in ("agents", "settings"):  # all agents of a shard share this key, so records wait until the key is deleted
        assert delivery.pending == 3
        raw.delete(*poisoned)
        collector.record_execution(good, 0.5, True)
        assert collector.flush()
        return
    assert delivery.dropped == 3
    assert "3 executions were not counted" in caplog.text
    collector.record_execution(bad, 0.5, True)
    collector.record_execution(good, 0.5, True)
    with pytest.raises(CorruptState):
        collector.flush()
    assert collector.get_or_create_metrics(good).task_count == 1, "the other agents of the shard are counted"


def test_read_names_a_key_of_wrong_type(backend: Backend, call: Call, raw: Raw, namespace: str) -> None:
    collector = MetricsCollector(backend=backend)
    collector.record_execution("research", 0.5, True)
    collector.flush()
    key = keys.metrics_total(namespace, keys.metrics_shard("research"), "research")
    raw.delete(key)
    raw.set(key, "foreign data")
    with pytest.raises(CorruptState) as caught:
        call(collector, "get_all_metrics")
    assert caught.value.key == key


@pytest.mark.parametrize("percentiles", [True, False])
def test_non_numeric_counter_is_named(
    backend: Backend, call: Call, raw: Raw, namespace: str, percentiles: bool
) -> None:
    collector = MetricsCollector(backend=backend)
    collector.record_execution("research", 0.5, True)
    collector.flush()
    key = keys.metrics_total(namespace, keys.metrics_shard("research"), "research")
    raw.hset(key, "sum_us", "many")
    with pytest.raises(CorruptState) as caught:
        call(collector, "snapshots", percentiles=percentiles)
    assert caught.value.key == key


@pytest.mark.parametrize("percentiles", [True, False])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "9" * 25),
        ("n", "-5"),
        ("err", "inf"),
        ("cost_nano", "nan"),
        ("max_us", "1e400"),
        ("last_ms", "253402300800000"),
    ],
)
def test_impossible_counter_is_corrupt_state(
    backend: Backend, call: Call, raw: Raw, namespace: str, percentiles: bool, field: str, value: str
) -> None:
    """A valid counter is a whole number of 0 or more that fits into 64 bits. A valid time is before the year 10000."""
    collector = MetricsCollector(backend=backend)
    collector.record_execution("research", 0.5, False)
    collector.record_llm("research", cost=1.0)
    collector.flush()
    raw.hset(keys.metrics_total(namespace, keys.metrics_shard("research"), "research"), field, value)
    with pytest.raises(CorruptState):
        call(collector, "snapshots", percentiles=percentiles)


@pytest.mark.parametrize("window", [None, "5m"])
def test_sums_saturate_at_the_largest_reply_integer(backend: Backend, call: Call, window: str | None) -> None:
    collector = MetricsCollector(backend=backend)
    for _ in range(20):
        collector.record_llm("research", cost=1e9, model="gpt-x")
    for percentiles in (True, False):
        found = call(collector, "snapshots", window=window, percentiles=percentiles)["research"]
        assert found.cost == 9223372036.854774784, "2^63 billionths, without an overflow to a negative number"
        assert found.llm_calls == 20


def aged_flush(raw: Raw, namespace: str, ages: list[float]) -> None:
    """Send one flush, as after an outage. It counts one execution for each age; ages are in seconds."""
    clock = [1000.0]
    buffer = Buffer(on_first=lambda: None, clock=lambda: clock[0])
    seconds, micros = raw.time()
    buffer.synchronise(seconds + micros / 1e6, 1000.0 + max(ages))
    for age in sorted(ages, reverse=True):
        clock[0] = 1000.0 + max(ages) - age
        buffer.record("research", 0.5, OK)
    clock[0] = 1000.0 + max(ages)
    buffer.aggregate()
    (batch,) = buffer.batches()
    command = commands.flush(namespace, batch, now=clock[0], retention=Retention())
    assert isinstance(command.script, Script)
    assert raw.eval(command.script.source, len(command.keys), *command.keys, *command.wire_args())[0] == 1


def test_delayed_samples_count_in_their_slices(backend: Backend, raw: Raw, namespace: str) -> None:
    ages = [0.0, 1.0, 45.0, 46.0, 47.0, 130.0]
    aged_flush(raw, namespace, ages)
    seconds, micros = raw.time()
    now = seconds + micros / 1e6
    collector = MetricsCollector(backend=backend)

    def seen(window: float, ago: float) -> int:
        return collector.get_or_create_metrics("research", window=window, as_of=now - ago).task_count

    for window, ago in ((1.0, 0.0), (10.0, 40.0), (10.0, 125.0), (10.0, 80.0), (60.0, 0.0), (300.0, 0.0), (60.0, 90.0)):
        # `interval` is the time range of the slices that a result covers. The test allows 0.2 s between the flush and
        # the reading of `now`. So an execution within 0.2 s of the start or end of the range may be counted or not.
        metrics = collector.get_or_create_metrics("research", window=window, as_of=now - ago)
        covered = metrics.interval
        certain = [now - age for age in ages if covered.start + 0.2 <= now - age < covered.end - 0.2]
        possible = [now - age for age in ages if covered.start - 0.2 <= now - age < covered.end + 0.2]
        assert len(certain) <= metrics.task_count <= len(possible), (window, ago, covered)
        assert metrics.exact
    assert seen(300.0, 0.0) == 6
    assert seen(3600.0, 0.0) == 6
    assert seen(86_400.0, 0.0) == 6
    assert seen(30.0, 60.0) == 0, "no burst where nothing happened"


def test_flush_delayed_by_a_stopped_server_keeps_its_time(backend: Backend, raw: Raw, namespace: str) -> None:
    buffer = Buffer(on_first=lambda: None, clock=lambda: 1000.0)
    assert buffer.server_ms(1000.0) == -1, "unknown before the first reply of the server"
    seconds, micros = raw.time()
    now = seconds + micros / 1e6
    buffer.synchronise(now - 45.0, 1000.0)
    buffer.record("research", 0.5, OK)
    buffer.aggregate()
    (batch,) = buffer.batches()
    command = commands.flush(namespace, batch, now=1000.0, retention=Retention(), server_ms=buffer.server_ms(1000.0))
    assert isinstance(command.script, Script)

    assert raw.eval(command.script.source, len(command.keys), *command.keys, *command.wire_args())[0] == 1

    collector = MetricsCollector(backend=backend)
    assert collector.get_or_create_metrics("research", window=20).task_count == 0, "no burst now"
    assert collector.get_or_create_metrics("research", window=20, as_of=now - 35.0).task_count == 1
    (sample,) = collector.recent("research")
    assert abs(sample.ended.timestamp() - (now - 45.0)) < 0.01


def test_server_that_restarts_empty_keeps_counting(own_server: Server, connect: Callable[..., Backend]) -> None:
    collector = MetricsCollector(backend=connect(own_server.url, deadline=2.0))
    for _ in range(3):
        collector.record_execution("research", 0.5, True)
    assert collector.flush()
    own_server.kill()
    for _ in range(4):
        collector.record_execution("research", 0.5, True)
    own_server.restart()
    wait_until(lambda: collector.delivery().pending == 0, "the server to be reached again")
    assert collector.metrics["research"].task_count == 4, "its counts are lost, the pending records are not"
    assert collector.delivery().counted == 7


def test_internal_error_keeps_pending_records(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collector = MetricsCollector(backend=backend)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "flush", broken)
    collector.record_execution("research", 0.5, True)
    with pytest.raises(AgentPerfError, match="ZeroDivisionError"):
        collector.flush()
    monkeypatch.undo()
    assert collector.flush()
    assert collector.metrics["research"].task_count == 1
    assert "flushing metrics failed" in caplog.text


def test_forks_during_recording_and_flushing_lose_nothing(backend: Backend) -> None:
    collector = MetricsCollector(backend=backend)
    going = threading.Event()
    stop = threading.Event()
    recorded = [0]

    def record() -> None:
        while not stop.is_set():
            for number in range(50):
                collector.record_execution(f"parent-{number}", 0.001, True)
                recorded[0] += 1
            collector.flush()
            going.set()

    thread = threading.Thread(target=record)
    thread.start()
    try:
        assert going.wait(10)
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    for _ in range(20):
                        collector.record_execution("child", 0.001, True)
                    status = 0 if collector.flush(timeout=10) and collector.delivery().counted == 20 else 2
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
    found = collector.metrics
    assert found.pop("child").task_count == 200
    assert sum(each.task_count for each in found.values()) == recorded[0]
