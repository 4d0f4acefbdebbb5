"""A part of a view that cannot be read hides no other part."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.command import Flow, Together
from agentperf_redis.errors import BackendUnavailable, CorruptState
from agentperf_redis.views.reading import Fault, Parts


def returns(value: Any) -> Flow[Any]:
    return value
    yield


def fails(error: Exception) -> Flow[Any]:
    raise error
    yield


def read(parts: Parts) -> Parts:
    flow: Any = parts.read()
    step = next(flow)
    assert isinstance(step, Together)
    for each in step.flows:
        assert list(each) == []
    with pytest.raises(StopIteration) as done:
        flow.send(None)
    assert id(done.value.value) == id(parts)
    return parts


def test_parts_are_found_by_name() -> None:
    parts = read(Parts(pools=returns([1]), caches=returns([2])))
    assert (parts.get("pools", []), parts.get("caches", []), parts.get("agents", [3])) == ([1], [2], [3])
    assert parts.faults == ()


def test_fault_of_a_part_is_reported() -> None:
    error = CorruptState("n:{lb:a}:state", "something else")
    parts = read(Parts(pools=fails(error), last_seen=fails(error), caches=returns([2])))
    assert parts.get("pools", [0]) == [0]
    assert parts.faults == (Fault("last seen", str(error)), Fault("pools", str(error)))


def test_names_of_pools_stay_as_they_are() -> None:
    error = CorruptState("n:{lb:my_pool}:history", "something else")
    parts = read(Parts(**{"history of pool my_pool": fails(error)}))
    assert [fault.part for fault in parts.faults] == ["history of pool my_pool"]


def test_outage_is_raised() -> None:
    with pytest.raises(BackendUnavailable):
        read(Parts(pools=fails(BackendUnavailable("here", "not_applied", "gone"))))
