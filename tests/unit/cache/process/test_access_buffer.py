"""The access buffer keeps the reads of a process until they are reported."""

from __future__ import annotations

from agentperf_redis.cache.process.access_buffer import MAX_PENDING, MAX_READS, NO_REPORT, AccessBuffer


def access_buffer(announced: list[int]) -> AccessBuffer:
    return AccessBuffer(lambda: "me", lambda: announced.append(1))


def test_reads_are_reported_once_oldest_first() -> None:
    announced: list[int] = []
    box = access_buffer(announced)
    assert box.take() is NO_REPORT
    for name in ("a", "b", "a"):
        box.read(name, 10)
    box.missed()
    box.found_corrupt()
    box.missed()

    report = box.take()

    assert (report.seq, report.misses, report.saved_ms, report.corrupt) == (1, 2, 30, 1)
    assert report.reads == (("b", 1), ("a", 2))
    assert announced == [1]
    assert box.take() is NO_REPORT, "a report is in flight"
    box.settle(report, confirmed=True)
    assert box.take() is NO_REPORT
    assert not box.waits


def test_unconfirmed_report_is_repeated_unchanged() -> None:
    announced: list[int] = []
    box = access_buffer(announced)
    box.read("a", 0)
    report = box.take(flush=True)
    wake_up = box.flushing
    box.read("b", 0)
    box.settle(report, confirmed=False)
    assert wake_up is not None
    given: list[int] = []
    wake_up.call_when_sent(lambda: given.append(1))
    assert given == [1]
    assert box.take() is report
    box.settle(report, confirmed=True)
    second = box.take()
    assert (second.seq, second.reads) == (2, (("b", 1),))


def test_unused_report_is_merged_with_later_reads() -> None:
    box = access_buffer([])
    for name in "ab":
        box.read(name, 5)
    box.missed()
    report = box.take()
    box.read("a", 1)
    box.settle(report, confirmed=False, unused=True)
    merged = box.take()
    assert (merged.seq, merged.misses, merged.saved_ms) == (2, 1, 11)
    assert merged.reads == (("b", 1), ("a", 2))

    box.settle(merged, confirmed=False)
    box.settle(box.take(), confirmed=False, unused=True)
    assert box.take() is merged, "the server may have recorded it in the first exchange"


def test_reports_and_buffered_reads_are_bounded() -> None:
    box = access_buffer([])
    for number in range(MAX_PENDING + 10):
        box.read(str(number), 0)
    assert box.is_full
    report = box.take()
    assert len(report.reads) == MAX_READS
    assert report.reads[0] == ("10", 1), "the oldest reads were dropped"
