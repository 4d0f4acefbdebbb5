"""Each failure and each rule of security in tests/data/failures.toml is proven by tests that exist."""

from __future__ import annotations

import re
import tomllib
from functools import cache

import pytest

from agentperf_redis import errors
from tests.support.places import DATA, ROOT

ROWS = tomllib.loads((DATA / "failures.toml").read_text(encoding="utf-8"))


@cache
def defined(path: str) -> frozenset[str]:
    """Return the tests of a file below tests/."""
    file = ROOT / "tests" / path
    if not file.exists():
        return frozenset()
    return frozenset(re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("row", [*ROWS["failure"], *ROWS["rule"]], ids=lambda row: row.get("event", row.get("rule")))
def test_named_tests_exist(row: dict[str, list[str]]) -> None:
    assert row["tests"]
    assert [test for test in row["tests"] if test.partition("::")[2] not in defined(test.partition("::")[0])] == []


def test_failures_name_their_error_loss_and_recovery() -> None:
    for row in ROWS["failure"]:
        assert set(row) == {"event", "raises", "lost", "recovery", "tests"}
        assert all(row[name] for name in ("event", "lost", "recovery"))
        assert row["raises"] == "" or issubclass(getattr(errors, row["raises"]), errors.AgentPerfError)
    assert all(set(row) == {"rule", "tests"} for row in ROWS["rule"])
