"""The rows of a series: their steps, their sums, and replies that no script sends."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.errors import CorruptState, InvalidArgument
from agentperf_redis.metrics.model import Interval
from agentperf_redis.metrics.series import SeriesReply, SeriesRow, _aligned, merged_rows, read_series
from agentperf_redis.windows import TimeRange, asked_steps

HOUR = TimeRange(3_600_000)


def step_text(words: str) -> bytes:
    """Return the text of a step as the script sends it."""
    return words.encode().replace(b" ", b"\x1f").replace(b"_", b" ")


def decoded(reply: Any, names: tuple[str, ...] = ("a",)) -> SeriesReply:
    found: SeriesReply = read_series("n", 3, names, HOUR, 60_000).decode(reply)
    return found


def test_rows_are_read_from_text() -> None:
    text = step_text("1 n 3 ok 2 err 1 ") + step_text("h:-3 2 h:zero 1 err:Lost_tool 1 mdl:m:n 4 ")
    text += b"sum_us\x1f1500000\x1fmin_us\x1f100000\x1fmax_us\x1f900000\x1f\n"
    reply = decoded([1, 200_000, 60_000, 240_000, b"a", text])
    zero, row, current = reply.rows[0]
    assert zero == SeriesRow(Interval(60.0, 120.0))
    assert row == SeriesRow(
        Interval(120.0, 180.0), 3, 1, 0, 1.5, 0.1, 0.9, buckets={-3: 2}, zeros=1, error_types={"Lost tool": 1}
    )
    assert current == SeriesRow(Interval(180.0, 200.001))
    assert (row.avg, row.failure_rate, row.throughput, row.p50) == (0.5, 1 / 3, 0.05, row.quantile(0.5))


def test_width_that_a_step_needs_is_read() -> None:
    assert decoded([0, 3_600_000, 0, 0]).needed_ms == 3_600_000


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "0 n",
        "0 n x",
        "9 n 1",
        "-1 n 1",
        "0 n 1 h:x 2",
        "0 n 1.5",
        "0 n 1 ok",
        None,
        7,
        "0 n 0x10",
        "0 err 1 err:\xff",
    ],
)
def test_unexpected_text_is_corrupt_state(text: Any) -> None:
    sent = step_text(text).replace(b"\xc3\xbf", b"\xff") if isinstance(text, str) else text
    with pytest.raises(CorruptState):
        decoded([1, 200_000, 60_000, 240_000, b"a", sent])


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(-5, 2**63), st.binary(max_size=20), st.just(b"a"), st.just(b"0\x1fn\x1f1\n")),
        lambda parts: st.lists(parts, max_size=8),
    )
)
def test_any_reply_is_decoded_or_refused(reply: Any) -> None:
    try:
        found = decoded(reply)
    except CorruptState:
        return
    assert found.needed_ms or len(found.rows) == 1


def test_reply_with_other_names_is_corrupt_state() -> None:
    for names in ([b"b", b""], [b"a", b"", b"b", b""], []):
        with pytest.raises(CorruptState):
            decoded([1, 200_000, 60_000, 240_000, *names])


def test_series_of_all_replies_have_the_same_steps() -> None:
    """A new step began between the two replies."""
    earlier = decoded([1, 119_999, 60_000, 120_000, b"a", step_text("0 n 1 \n")])
    later = decoded([1, 120_000, 60_000, 180_000, b"a", step_text("1 n 2 \n")])
    moved = SeriesReply(later.now_ms, 120_000, later.to_ms, [rows[1:] for rows in later.rows])
    (first,), (second,) = _aligned([earlier, later], 60_000)
    assert [row.tasks for row in first] == [1, 0]
    assert [row.tasks for row in second] == [0, 2]
    assert [row.interval for row in first] == [row.interval for row in second]
    (first,), (second,) = _aligned([earlier, moved], 60_000)
    assert [(row.interval.start, row.tasks) for row in first] == [(120.0, 0)]
    assert [(row.interval.start, row.tasks) for row in second] == [(120.0, 2)]


ROW = SeriesRow(Interval(60.0, 120.0), 3, 1, 1, 1.5, 0.1, 0.9, 10, 20, 0.25, {-3: 2}, 1, {"T": 1})


def test_merged_rows_add_counts_and_compare_extremes() -> None:
    other = SeriesRow(Interval(0.0, 60.0), 1, 1, 0, 2.0, 2.0, 2.0, 1, 2, 0.5, {-3: 1, 16: 1}, 0, {"T": 1})
    empty = SeriesRow(Interval(120.0, 180.0))
    assert merged_rows(iter((ROW, other, empty))) == SeriesRow(
        Interval(0.0, 180.0), 4, 2, 1, 3.5, 0.1, 2.0, 11, 22, 0.75, {-3: 3, 16: 1}, 1, {"T": 2}
    )
    assert merged_rows([ROW]) == ROW
    assert merged_rows([empty]) == empty
    with pytest.raises(InvalidArgument, match="rows"):
        merged_rows(())


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROW.tasks = 5  # type: ignore[misc]
    with pytest.raises(InvalidArgument, match="share"):
        ROW.quantile(95)


@pytest.mark.parametrize(
    ("window", "step", "expected"),
    [("1h", "1m", 60_000), (3600, 60.0, 60_000), ("2000m", "1m", 60_000), (10, 10, 10_000)],
)
def test_steps_are_accepted(window: Any, step: Any, expected: int) -> None:
    assert asked_steps(window, step, None)[1] == expected


def test_error_names_the_shortest_step() -> None:
    with pytest.raises(InvalidArgument, match="at least 130s") as met:
        asked_steps("3d", "1m", None)
    assert (met.value.argument, met.value.value) == ("step", "1m")


@pytest.mark.parametrize("to_ms", [60_000 * 3000, 2**62, 10**400])
def test_reply_with_too_many_steps_is_corrupt_state(to_ms: int) -> None:
    """A row for each step would take a long time and much memory."""
    with pytest.raises(CorruptState):
        decoded([1, 2**62, 0, to_ms, b"a", b""])
