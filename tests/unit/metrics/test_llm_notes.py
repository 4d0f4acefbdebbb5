from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.metrics import llm_notes
from agentperf_redis.metrics.llm_notes import UsageNotes, inconsistent_usages, unread_usages


@pytest.mark.parametrize(("make", "word"), [(unread_usages, "no token counts"), (inconsistent_usages, "total")])
def test_kinds_are_logged_once_and_usages_counted(make: Any, word: str, caplog: pytest.LogCaptureFixture) -> None:
    notes = make()
    for _ in range(3):
        notes.note({"secret": "text", "b": 1})
        notes.note(object())
    assert notes.count == 6
    first, second = [record.getMessage() for record in caplog.records]
    assert word in first
    assert "<dict with b, secret>" in first
    assert "text" not in first, "its content may be private"
    assert "<object>" in second


def test_count_is_reduced_without_logging(caplog: pytest.LogCaptureFixture) -> None:
    notes = UsageNotes("%s")
    notes.add(2)
    notes.add(-1)
    assert (notes.count, caplog.records) == (1, [])


def test_logged_kinds_are_limited(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(llm_notes, "_MAX_KINDS", 2)
    notes = UsageNotes("%s")
    for name in "abc":
        notes.note({name: 1})
    assert notes.count == 3
    assert [record.getMessage() for record in caplog.records] == ["dict with a", "dict with b"]


def test_object_that_raises_on_description_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(dict[str, int]):
        def __iter__(self) -> Any:
            raise RuntimeError

    notes = UsageNotes("%s")
    notes.note(Broken(a=1))
    assert notes.count == 1
    assert [record.getMessage() for record in caplog.records] == ["an object that cannot be described"]
