from __future__ import annotations

from agentperf_redis.web.charts.small import meter, sparkline


def test_sparkline_has_a_text_for_people_who_do_not_see_it() -> None:
    found = sparkline([1, None, 2], "Executions, at most 2")
    assert 'role="img" aria-label="Executions, at most 2"' in found


def test_sparkline_without_values_is_a_flat_line() -> None:
    assert 'd="M0 24H1000"' in sparkline([None, None], "nothing")
    assert 'd="M250 20L750 20"' in sparkline([0, 0], "zero")


def test_meter_is_full_at_its_maximum_and_never_longer() -> None:
    assert 'width="50%"' in meter(1, 2, "1 of 2")
    assert meter(3, 2, "3 of 2").count('width="100%" height="8"') == 2


def test_empty_meter_has_only_its_track() -> None:
    assert meter(0, 2, "0 of 2").count("<rect") == 1
    assert meter(1, 0, "1 of 0").count("<rect") == 1
