from __future__ import annotations

import pytest

from agentperf_redis.alerts.evaluation import Verdict
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.alerts.sampled import Slice, judged_slices, slices_of
from agentperf_redis.history import History

HOUR_MS, MINUTE_MS = 3_600_000, 60_000
NOW_MS = 1000 * HOUR_MS


def alert(fields: str) -> Rule:
    (made,) = read_rules(f'[[alert]]\nname = "a"\n{fields}').rules
    return made


def test_slices_are_the_narrowest_that_are_kept() -> None:
    history = History(NOW_MS, {(10_000, NOW_MS - 10_000): {"samples": 1, "waiters": 3}})
    slices = slices_of(history, NOW_MS - 5 * HOUR_MS, NOW_MS, 10_000)
    assert [each.begin_ms for each in slices[1:]] == [each.end_ms for each in slices[:-1]], "they are contiguous"
    widths = [each.end_ms - each.begin_ms for each in slices]
    assert sorted(widths, reverse=True) == widths
    assert (widths.count(HOUR_MS), widths.count(MINUTE_MS), widths.count(10_000)) == (3, 106, 84)
    assert slices[-1].figures == {"samples": 1, "waiters": 3}
    assert {each.end_ms - each.begin_ms for each in slices_of(history, NOW_MS - HOUR_MS, NOW_MS, 60_000)} == {MINUTE_MS}


def test_window_of_a_cache_is_judged_at_the_end_of_each_slice() -> None:
    rule = alert('cache = "x"\nwhen = "hit_rate < 50%"\nwindow = "5m"')
    figures = [{"hits": 30, "misses": 0}] * 5 + [None] * 6 + [{"hits": 0, "misses": 30}] * 2
    slices = [Slice(n * MINUTE_MS, (n + 1) * MINUTE_MS, each) for n, each in enumerate(figures)]
    judged = judged_slices(rule, slices, 4 * MINUTE_MS, 13 * MINUTE_MS)
    assert [at_ms // MINUTE_MS for at_ms, _ in judged] == list(range(5, 14))
    verdicts = [found for _, (found, _) in judged]
    assert verdicts == [Verdict.CLEAR] * 5 + [Verdict.NO_DATA] * 2 + [Verdict.HOLDS] * 2


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ('cache = "x"\nwhen = "evictions > 5"', 7.0),
        ('cache = "x"\nwhen = "size > 5"', 3.0),
        ('cache = "x"\nwhen = "bytes > 5"', 40.0),
        ('pool = "x"\nwhen = "load > 5"', 10.0),
        ('pool = "x"\nwhen = "load > 50%"', 0.25),
        ('pool = "x"\nwhen = "healthy < 5"', 6.0),
        ('pool = "x"\nwhen = "unfit > 5"', 0.0),
        ('pool = "x"\nwhen = "waiters > 5"', 2.0),
        ('pool = "x"\nwhen = "overdue > 5"', 3.0),
    ],
)
def test_figures_of_a_sample(fields: str, value: float) -> None:
    figures = {"samples": 6, "evictions": 7, "size": 3, "bytes": 40, "load": 9, "waiters": 4, "unhealthy": 1}
    figures |= {"last_load": 10, "last_capacity": 40, "last_healthy": 6, "last_waiters": 2, "last_overdue": 3}
    ((_, (_, measured)),) = judged_slices(alert(fields), [Slice(0, 10_000, figures)], 0, 10_000)
    assert measured is not None
    assert measured.value == value


def test_sample_of_an_earlier_version_is_no_data() -> None:
    rule = alert('pool = "x"\nwhen = "healthy < 5"')
    slices = [Slice(0, 10_000, {"samples": 1, "load": 9}), Slice(10_000, 20_000, {"samples": 1, "last_capacity": 9})]
    judged = judged_slices(rule, slices, 0, 20_000)
    assert [found for _, (found, _) in judged] == [Verdict.NO_DATA, Verdict.HOLDS]
