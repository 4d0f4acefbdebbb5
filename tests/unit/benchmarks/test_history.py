"""The comparison of a benchmark run with the runs before it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import history
from tests.benchmarks.measure import Row

GET = Row("get", "85 us", "raw GET 86.5 us", 1.0, "<= 1.25 x", True)
USE = Row("use of 10 slots", "98%", "all of the time", 0.98, ">= 90%", True)
PLAIN = Row("hand-off", "1 ms", "", None, "", None)


def kept(place: Path, *ratios: float, row: Row = GET, full: bool = False) -> None:
    for ratio in ratios:
        history.save([replace(row, ratio=ratio), PLAIN], full=full, place=place)


def found(place: Path, row: Row, *, full: bool = False) -> list[str]:
    return [str(each) for each in history.regressions([row, PLAIN], full=full, place=place)]


def test_first_run_reports_no_regression(tmp_path: Path) -> None:
    assert found(tmp_path / "none" / "history.jsonl", GET) == []


def test_ratio_much_worse_than_the_median_is_reported(tmp_path: Path) -> None:
    place = tmp_path / "kept" / "history.jsonl"
    kept(place, 9.0, 1.0, 1.0, 1.1, 0.9, 5.0)  # the first ratio is too old to count; the last ratio is an outlier
    assert found(place, replace(GET, ratio=1.2, reference="raw GET 91 us")) == []
    assert found(place, replace(GET, ratio=1.5)) == ["get: 1.50, was 1.00 (median of 5)"]
    (first, *_) = place.read_text().splitlines()
    assert json.loads(first)["rows"][0]["ratio"] == 9.0


def test_smaller_share_is_a_regression(tmp_path: Path) -> None:
    kept(tmp_path / "h", 0.98, row=USE)
    assert found(tmp_path / "h", replace(USE, ratio=0.7)) == ["use of 10 slots: 0.70, was 0.98 (median of 1)"]
    assert found(tmp_path / "h", replace(USE, ratio=1.4)) == []


def test_runs_under_other_conditions_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "h"
    kept(place, 1.0)
    slow = replace(GET, ratio=3.0)
    assert found(place, slow) != []
    assert found(place, replace(slow, reference="cashews mem 38.9 us")) == []
    assert found(place, slow, full=True) == []
    monkeypatch.setattr(history, "machine", lambda: "another")
    assert found(place, slow) == []
