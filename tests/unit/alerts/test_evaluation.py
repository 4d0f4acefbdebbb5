from __future__ import annotations

import random

import pytest

from agentperf_redis.alerts.evaluation import BurnCounts, Verdict, burn_verdict, judge, verdict
from agentperf_redis.alerts.model import AlertState, Measured, Notice, TargetState
from agentperf_redis.alerts.rules import Rule
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.metrics.model import Interval

HOLDS, CLEAR, BETWEEN, UNDECIDED, NO_DATA = Verdict
MINUTE_MS = 60_000
SIGNS = {"+": HOLDS, "-": CLEAR, "=": BETWEEN, "?": UNDECIDED, "0": NO_DATA}


def rule(**fields: object) -> Rule:
    values = {"name": "a", "agents": "x", "when": "p95 > 2s", **{name.rstrip("_"): of for name, of in fields.items()}}
    lines = "\n".join(f"{name} = {of if isinstance(of, int) else repr(of)}" for name, of in values.items())
    (made,) = read_rules(f"[[alert]]\n{lines}").rules
    return made


def history(of: Rule, signs: str, *, silenced: range = range(0), gap_ms: int = MINUTE_MS) -> str:
    """Return the state after each verdict, as one letter. A letter is upper case if a notification was sent."""
    state, shown = None, ""
    for number, sign in enumerate(signs):
        if sign == " ":
            continue
        at_ms = 10 * MINUTE_MS + number * gap_ms
        judgement = judge(of, state, SIGNS[sign], None, at_ms, silenced=number in silenced)
        state = judgement.state
        letter = {"ok": "o", "pending": "p", "firing": "f", "no_data": "n"}[state.state.value]
        shown += letter.upper() if judgement.notice is not None else letter
    return shown


@pytest.mark.parametrize(
    ("fields", "signs", "states"),
    [
        ({}, "-+-", "oFO"),
        ({"for_": "2m"}, "-++++-", "oppFfO"),
        ({"for_": "2m"}, "++-+++", "ppoppF"),
        # "?" means that the threshold lies within the error bounds of the value. A "?" neither starts nor stops the
        # firing, and its minute does not count towards `for_`.
        ({}, "-??????", "ooooooo"),
        ({}, "+???-", "FfffO"),
        ({"for_": "2m"}, "+?+++", "pppFf"),
        ({"for_": "2m"}, "+????", "ppppp"),
        # "=" means that the value lies between the levels of `when` and `resolve`, so neither condition holds.
        ({"resolve": "p95 < 1s"}, "+===-", "FfffO"),
        ({"resolve": "p95 < 1s"}, "===", "ooo"),
        ({"for_": "2m", "resolve": "p95 < 1s"}, "+=+++", "poppF"),
        ({"keep_firing_for": "2m"}, "+---", "FffO"),
        ({"keep_firing_for": "2m"}, "+--+---", "FfffffO"),
        ({"keep_firing_for": "2m"}, "+-??--", "FffffO"),
        ({"keep_firing_for": "2m", "resolve": "p95 < 1s"}, "+-=---", "FffffO"),
        # "0" means no data.
        ({}, "00-", "nno"),
        ({}, "+000-", "FfffO"),
        ({"for_": "2m"}, "+0+++", "pnppF"),
        ({"no_data": "ok"}, "+0", "FO"),
        ({"no_data": "ok"}, "00", "oo"),
        ({"no_data": "alert", "for": "1m"}, "00-", "pFO"),
        # reminders
        ({"renotify": "2m"}, "+++++-", "FfFfFO"),
    ],
)
def test_states_follow_from_verdicts(fields: dict[str, object], signs: str, states: str) -> None:
    assert history(rule(**fields), signs) == states


def test_silence_delays_the_notification_of_a_firing_alert() -> None:
    assert history(rule(), "-+++-", silenced=range(3)) == "offFO"
    assert history(rule(), "-++--", silenced=range(5)) == "offoo", "no notification of the firing was sent"
    assert history(rule(), "+++-", silenced=range(1, 4)) == "FffO", "the receiver waits for the end"
    assert history(rule(renotify="1m"), "+++", silenced=range(1, 2)) == "FfF"


def test_time_without_evaluation_does_not_count() -> None:
    """If no evaluation runs for an hour, `for` and `keep_firing_for` count only one interval of this hour."""
    held, kept = rule(for_="5m"), rule(keep_firing_for="5m")
    assert history(held, "++", gap_ms=60 * MINUTE_MS) == "pp"
    assert history(kept, "+--", gap_ms=60 * MINUTE_MS) == "Fff"
    assert history(held, "+ +++", gap_ms=MINUTE_MS) == "pppp", "one missed interval counts: a dead evaluator costs one"
    assert history(held, "+ ++++", gap_ms=MINUTE_MS) == "ppppF"


def test_longer_intervals_of_a_replay_count() -> None:
    of = rule(for_="5m")
    state = judge(of, None, HOLDS, None, MINUTE_MS).state
    hour_later = judge(of, state, HOLDS, None, 61 * MINUTE_MS, interval_ms=60 * MINUTE_MS)
    assert hour_later.state.state is AlertState.FIRING


def test_evaluation_at_an_earlier_time_changes_no_timer() -> None:
    of = rule(for_="5m")
    state = judge(of, None, HOLDS, None, 100 * MINUTE_MS).state
    again = judge(of, state, HOLDS, None, 90 * MINUTE_MS)
    assert (again.state.state, again.state.timer_ms, again.changed) == (AlertState.PENDING, 100 * MINUTE_MS, False)


def test_judgement_is_recorded_in_the_state() -> None:
    measured = Measured(3.0, 2.9, 3.1, 50, Interval(1.0, 2.0))
    found = judge(rule(), None, HOLDS, measured, 5 * MINUTE_MS)
    assert found.notice is Notice.FIRING
    assert found.state == TargetState(
        AlertState.FIRING, 300_000, 0, 300_000, 300_000, 300_000, value=3.0, low=2.9, high=3.1
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_verdicts_keep_the_invariants(seed: int) -> None:
    """Only HOLDS starts a firing, and only CLEAR ends it. Each start and each end causes one notification."""
    source = random.Random(seed)
    of = rule(for_=f"{source.randrange(4)}m", keep_firing_for=f"{source.randrange(4)}m")
    state, notified = None, False
    for number in range(1, 300):
        at_ms = number * MINUTE_MS
        found = source.choice([HOLDS, HOLDS, CLEAR, BETWEEN, UNDECIDED, NO_DATA])
        before = state.state if state is not None else AlertState.OK
        judgement = judge(of, state, found, None, at_ms)
        state = judgement.state
        assert judgement.changed == (state.state is not before)
        if state.state is AlertState.FIRING and before is not AlertState.FIRING:
            assert found is HOLDS
            assert judgement.notice is Notice.FIRING
            assert not notified
            notified = True
        elif before is AlertState.FIRING and state.state is not AlertState.FIRING:
            assert found is CLEAR
            assert judgement.notice is Notice.RESOLVED
            notified = False
        else:
            assert judgement.notice is None
        if found in (UNDECIDED, NO_DATA):
            assert before is not AlertState.FIRING or state.state is AlertState.FIRING


@pytest.mark.parametrize(
    ("low", "high", "events", "found"),
    [
        (2.1, 2.2, 20, HOLDS),
        (2.1, 2.2, 19, UNDECIDED),
        (2.1, 2.2, 0, NO_DATA),
        (1.95, 2.05, 20, UNDECIDED),
        (1.5, 1.6, 20, BETWEEN),
        (0.95, 1.05, 20, BETWEEN),
        (0.5, 0.6, 20, CLEAR),
    ],
)
def test_verdict_on_a_value(low: float, high: float, events: int, found: Verdict) -> None:
    of = rule(resolve="p95 < 1s")
    assert verdict(of, Measured((low + high) / 2, low, high, events, Interval(0.0, 1.0))) is found
    assert verdict(of, None) is NO_DATA


def test_zero_executions_are_data_for_a_count() -> None:
    assert verdict(rule(when="tasks < 1"), Measured(0.0, 0.0, 0.0, 0, Interval(0.0, 1.0))) is HOLDS


PAGE, TICKET = read_rules('[[slo]]\nname = "s"\nagents = "x"\nobjective = "99%"').rules


def counts(of: Rule, bad: dict[float, tuple[int, int, int]]) -> dict[float, BurnCounts]:
    return {window: BurnCounts(*bad.get(window, (1000, 0, 0))) for window in of.windows}


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({}, CLEAR),
        ({3600.0: (1000, 145, 145), 300.0: (100, 15, 15)}, HOLDS),
        ({3600.0: (1000, 144, 144), 300.0: (100, 15, 15)}, CLEAR),
        ({3600.0: (1000, 145, 145), 300.0: (100, 14, 14)}, CLEAR),
        ({3600.0: (1000, 140, 150), 300.0: (100, 15, 15)}, UNDECIDED),
        ({3600.0: (1000, 145, 145), 300.0: (0, 0, 0)}, UNDECIDED),
        ({3600.0: (19, 10, 10), 300.0: (19, 10, 10)}, UNDECIDED),
        ({21_600.0: (1000, 61, 61), 1800.0: (1000, 61, 61)}, HOLDS),
        ({3600.0: (0, 0, 0), 300.0: (0, 0, 0)}, CLEAR),
        (dict.fromkeys(PAGE.windows, (0, 0, 0)), NO_DATA),
    ],
)
def test_burn_rate_needs_both_windows(bad: dict[float, tuple[int, int, int]], found: Verdict) -> None:
    assert burn_verdict(PAGE, counts(PAGE, bad))[0] is found


def test_burn_rate_is_that_of_the_long_window() -> None:
    _, value, low, high = burn_verdict(PAGE, counts(PAGE, {3600.0: (1000, 100, 300), 300.0: (100, 15, 15)}))
    assert [value, low, high] == pytest.approx([20.0, 10.0, 30.0])
