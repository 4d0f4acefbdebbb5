from __future__ import annotations

import json
import math

import pytest

from agentperf_redis.alerts.model import AlertEvent, AlertState, Firing, Replay, TargetState, plain
from agentperf_redis.metrics.model import Interval

STATE = TargetState(AlertState.FIRING, 1, 2, 3, 4, 5, 2.5, 2.25, 1e-7, "5:6:7:8,9:10:11:12")
EVENT = AlertEvent(
    "id", "a rule", "plan/ner", AlertState.OK, AlertState.FIRING, 5.5, 2.5, None, 3.0, Interval(1.0, 2.0), "why not"
)


@pytest.mark.parametrize("state", [STATE, TargetState(), TargetState(value=math.inf), TargetState(value=1e300)])
def test_state_survives_packing(state: TargetState) -> None:
    again = TargetState.unpacked(state.packed())
    assert again.packed() == state.packed()
    assert (again.state, again.timer_ms, again.samples) == (state.state, state.timer_ms, state.samples)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        STATE.packed().replace("firing", "silenced"),
        STATE.packed().replace("seen=3", "seen=x"),
        STATE.packed().replace("seen=3", "seen=253402300800000"),
        STATE.packed().replace("seen=3", "seen=" + "9" * 25),
        STATE.packed().replace("value=2.5", "value=inf"),
        STATE.packed().replace("value=2.5", "value=nan"),
        STATE.packed().replace("value=2.5", "value=1e400000"),
        STATE.packed().replace("value=2.5", "value=1e400"),
        STATE.packed() + " more",
    ],
)
def test_damaged_state_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        TargetState.unpacked(text)


def test_event_survives_packing() -> None:
    packed = EVENT.packed()
    assert len(packed) == 12
    assert (packed["rule"], packed["target"], packed["low"]) == ("a%20rule", "plan%2Fner", "-")
    assert AlertEvent.unpacked(packed) == EVENT


@pytest.mark.parametrize("field", ["at", "value", "start"])
@pytest.mark.parametrize("text", ["x", "nan", "inf", "9" * 40])
def test_damaged_event_is_a_value_error(field: str, text: str) -> None:
    with pytest.raises(ValueError):
        AlertEvent.unpacked({**EVENT.packed(), field: text})


def test_result_becomes_json() -> None:
    replay = Replay((Firing("a", "x", "page", 1.0, None, 2.0),), Interval(0.0, 5.0), ("why",), 7)
    assert json.loads(json.dumps(plain(replay)))["firings"][0]["end"] is None
    assert plain(EVENT)["after"] == "firing"
