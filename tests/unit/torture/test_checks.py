"""Each check of the torture run accepts a sound journal, and complains about an unsound one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.support.pool_history import Unsound, check_histories
from tests.torture import checks
from tests.torture.journal import Line
from tests.torture.work import PUT_KEYS, TTL_KEYS, TTL_S

KEY, OTHER_KEY = PUT_KEYS[:2]
BRIEF = TTL_KEYS[0]


def journal(*entries: tuple[Any, ...]) -> list[Line]:
    """Return lines from tuples of worker, kind, time and values."""
    return [Line(worker, kind, at, tuple(values)) for worker, kind, at, *values in entries]


def written(worker: int, value: str, begun: float, how: str = "put", keys: Sequence[str] = (KEY,)) -> list[Line]:
    """Return the lines of a write that took 0.1 s."""
    return journal((worker, "write", begun, how, value, list(keys)), (worker, "wrote", begun + 0.1, value))


def read(worker: int, value: str, begun: float, *, fresh: bool = False, key: str = KEY) -> list[Line]:
    return journal((worker, "read", begun, key, value, begun, fresh))


WROTE_TWICE = [*written(0, "old", 1.0), *written(0, "new", 2.0)]
DELETED = [*written(0, "old", 1.0), *written(1, "gone", 2.0, "clear", PUT_KEYS)]
UNANSWERED = [*written(0, "old", 1.0), *journal((0, "write", 2.0, "put", "new", [KEY]))]
LATE, EARLY = 2.1 + checks.STALE_S + 0.01, 2.1 + checks.STALE_S - 0.01


@pytest.mark.parametrize(
    ("lines", "sound"),
    [
        ([*WROTE_TWICE, *read(1, "new", LATE)], True),
        ([*WROTE_TWICE, *read(1, "old", LATE)], False),
        ([*WROTE_TWICE, *read(1, "old", EARLY)], True),
        ([*WROTE_TWICE, *read(1, "old", EARLY, fresh=True)], False),
        ([*WROTE_TWICE, *read(0, "old", EARLY)], False),
        ([*DELETED, *read(0, "old", LATE)], False),
        ([*DELETED, *read(0, "old", EARLY)], True),
        ([*UNANSWERED, *read(1, "new", LATE)], True),
        ([*UNANSWERED, *read(1, "old", LATE)], True),
        ([*WROTE_TWICE, *read(1, "new", LATE, key=OTHER_KEY)], False),
    ],
)
def test_stale_read_is_found(lines: list[Line], sound: bool) -> None:
    assert bool(list(checks.stale_reads(lines))) is not sound


def test_value_computed_before_an_invalidation_is_stale() -> None:
    computed = journal((0, "computes", 1.0, "fill0", "v", 0.9), (0, "computed", 3.0, "fill0", "v"))
    assert list(checks.stale_reads([*computed, *read(1, "v", 9.0, key="fill0")])) == []
    invalidated = written(1, "gone", 2.0, "tag", ["fill0"])
    assert list(checks.stale_reads([*computed, *invalidated, *read(1, "v", 9.0, key="fill0")]))


@pytest.mark.parametrize(("asked", "sound"), [(1.0 + TTL_S, True), (1.1 + TTL_S, False)])
def test_value_past_its_ttl_is_found(asked: float, sound: bool) -> None:
    lines = journal((0, "found", 1.0, BRIEF, "0.7.1", 0.9), (1, "found", asked + 0.1, BRIEF, "0.7.1", asked))
    assert bool(list(checks.values_past_their_ttl(lines))) is not sound


@pytest.mark.parametrize(
    ("second", "outages", "sound"),
    [
        (1.2, [], False),
        (1.6, [], True),
        (1.2, [(0.5, 1.1)], True),
        (1.2, [(3.0, 4.0)], False),
    ],
)
def test_double_computation_is_found(second: float, outages: list[tuple[float, float]], sound: bool) -> None:
    lines = journal(
        (0, "computes", 1.0, BRIEF, "a", 0.9),
        (0, "computed", 1.5, BRIEF, "a"),
        (1, "computes", second, BRIEF, "b", second - 0.05),
    )
    assert bool(list(checks.double_computations(lines, 1.0, outages))) is not sound


@pytest.mark.parametrize(("worker", "at", "sound"), [(1, 1.17, True), (0, 1.17, False), (1, 1.1, False)])
def test_computation_without_a_lease_is_announced_by_a_warning(worker: int, at: float, sound: bool) -> None:
    lines = journal(
        (0, "computes", 1.0, BRIEF, "a", 0.9),
        (0, "computed", 1.5, BRIEF, "a"),
        (worker, "warned", at, "computing without the cache"),
        (1, "computes", 1.2, BRIEF, "b", 1.15),
    )
    assert bool(list(checks.double_computations(lines, 1.0, []))) is not sound


@pytest.mark.parametrize(
    ("stored", "killed", "end", "sound"),
    [
        (10, set(), (10, 10, 0, 0), True),
        (9, set(), (10, 10, 0, 0), False),
        (11, set(), (10, 10, 0, 0), False),
        (9, set(), (10, 9, 0, 1), False),
        (8, {0}, None, True),
        (10, {0}, None, True),
        (7, {0}, None, False),
        (11, {0}, None, False),
        (10, set(), None, False),
    ],
)
def test_wrong_count_is_found(stored: int, killed: set[int], end: Iterable[int] | None, sound: bool) -> None:
    lines = journal((0, "records", 1.0, 10), (0, "delivered", 1.1, 8, 0, 0))
    if end is not None:
        lines += journal((0, "ended", 2.0, *end))
    assert bool(list(checks.lost_or_doubled_counts(lines, {"agent-0": stored}, killed))) is not sound


@pytest.mark.parametrize(
    ("logged", "received", "sound"),
    [
        (["a", "b"], ["a", "b", "a"], True),
        (["a", "b"], ["a"], False),
        (["a"], ["a", "x"], False),
        (["a", "a"], ["a"], False),
        ([], [], False),
    ],
)
def test_lost_or_renamed_alert_is_found(logged: list[str], received: list[str], sound: bool) -> None:
    lines = journal((0, "transition", 1.0, "a"))
    assert bool(list(checks.lost_or_renamed_alerts(lines, logged, received))) is not sound


def test_undocumented_error_is_found() -> None:
    lines = journal((3, "fault", 1.0, "_record", "KeyError", "Traceback …"), (3, "error", 1.0, "_record", "X", ""))
    assert list(checks.undocumented_errors(lines)) == ["worker 3, _record: Traceback …"]


@pytest.mark.parametrize(
    ("histories", "complaint"),
    [
        ([["grant @a p 1 1", "free @a p", "grant @b p 2 1"]], ""),
        ([["grant @a p 1 1", "free @a p", "grant @b p 2 1"], ["grant @c q 1 1", "end @c q 1"]], ""),
        ([["grant @a p 1 1", "grant @b p 2 1"]], "were held"),
        ([["grant @a p 2 2", "grant @b p 2 2"]], "after fence"),
        ([["grant @a p 1 1", "end @a p 1", "grant @a p 2 1"]], "second time"),
        ([["grant @a p 1 1", "end @a p 0", "grant @a p 2 1", "free @a p", "grant @b p 3 1"]], ""),
        ([["grant @a p 1 1", "end @a p 1", "free @a p"]], "not held"),
        ([["grant @b p 1 1"], ["grant @b q 1 1"]], "also in shard 0"),
        ([["grant @b p 1 1"], ["grant @c p 2 1"]], "also in shard 0"),
    ],
)
def test_unsound_history_of_a_pool_is_found(histories: list[list[str]], complaint: str) -> None:
    if complaint:
        with pytest.raises(Unsound, match=complaint):
            check_histories(histories)
    else:
        assert check_histories(histories) == {"@b": "p"}


@pytest.mark.parametrize(
    ("seen", "sound"), [("got @a", True), ("freed @a", True), ("got @b", False), ("freed @b", False)]
)
def test_reply_that_the_history_lacks_is_found(seen: str, sound: bool) -> None:
    lines = journal((0, seen.split(" ", maxsplit=1)[0], 1.0, seen.split(" ")[1]))
    assert bool(list(checks.unsound_leases([["grant @a p 1 1", "free @a p"]], lines))) is not sound
