from __future__ import annotations

import pytest

from agentperf_redis.alerts.model import AlertState, TargetState
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.alerts.transitions import outcome_of

AT_MS = 600_000
WHEN = {"agents": "p95 > 2s", "cache": "hit_rate < 90%", "pool": "load > 90%"}


@pytest.mark.parametrize(
    ("scope", "pattern", "target", "is_watched"),
    [
        ("agents", "x (tiered)", "x (tiered)", True),
        ("pool", "x (tiered)", "x (tiered)", True),
        ("agents", "x", "x (tiered)", False),
        ("cache", "x", "x (tiered)", True),
        ("cache", "x", "x", True),
        ("cache", "y", "x (tiered)", False),
    ],
)
def test_missing_target_keeps_its_state_while_watched(scope: str, pattern: str, target: str, is_watched: bool) -> None:
    (rule,) = read_rules(f"[[alert]]\nname = 'a'\n{scope} = '{pattern}'\nwhen = '{WHEN[scope]}'\n").rules
    before = TargetState(AlertState.OK, since_ms=AT_MS, seen_ms=AT_MS, data_ms=AT_MS)

    outcome = outcome_of(rule, {target: before}, {}, AT_MS + 60_000, silenced=False)

    assert outcome.gone == ([] if is_watched else [target])
    assert list(outcome.states) == ([target] if is_watched else [])
