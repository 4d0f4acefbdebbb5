"""The balancer's data model: instances, labels and snapshots."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentperf_redis.balancer.model import (
    MAX_LABELS,
    AgentInstance,
    LoadBalancingStrategy,
    PoolStatus,
    checked_labels,
)
from agentperf_redis.errors import InvalidArgument


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("id", ""),
        ("agent_type", 5),
        ("max_capacity", 0),
        ("weight", -1),
        ("labels", "gpu"),
        ("current_load", -1),
        ("is_healthy", 1),
        ("response_time_ms", math.inf),
        ("is_draining", None),
    ],
)
def test_instance_refuses_a_bad_field(argument: str, value: object) -> None:
    fields: dict[str, Any] = {"id": "p", "agent_type": "planner", argument: value}
    with pytest.raises(InvalidArgument) as refused:
        AgentInstance(**fields)
    assert refused.value.argument == argument


@pytest.mark.parametrize("value", ["gpu", b"gpu", 5, None, [""], ["a\nb"], [None], {1: 2}])
def test_labels_must_be_a_collection_of_names(value: object) -> None:
    with pytest.raises(InvalidArgument, match="labels"):
        checked_labels("labels", value)
    assert checked_labels("labels", ["a", "b", "a"]) == {"a", "b"}


def test_number_of_labels_is_bounded() -> None:
    many = [f"l{number}" for number in range(MAX_LABELS + 1)]
    with pytest.raises(InvalidArgument, match=rf"number of labels is {MAX_LABELS + 1}"):
        checked_labels("labels", many)
    assert len(checked_labels("labels", many[1:])) == MAX_LABELS


def test_instance_errors_name_its_own_fields() -> None:
    make: Any = AgentInstance
    with pytest.raises(TypeError, match=r"^AgentInstance\.__init__"):
        make(id="a")
    instance: Any = AgentInstance("a", "t")
    with pytest.raises(AttributeError, match="no field 'foo'"):
        instance.foo = 1


def test_load_is_a_share_of_capacity() -> None:
    instance = AgentInstance("p", "t", current_load=3, max_capacity=4)
    assert (instance.load_percentage, instance.available_capacity) == (75.0, 1)
    over = AgentInstance("p", "t", current_load=5, max_capacity=4)
    assert (over.load_percentage, over.available_capacity) == (125.0, 0)


def test_empty_pool_renders_like_the_in_memory_version() -> None:
    status = PoolStatus("t", LoadBalancingStrategy.RANDOM, (), waiting=0, granted=0, overdue=0)
    assert status.render() == {
        "instances": 0,
        "healthy": 0,
        "total_capacity": 0,
        "current_load": 0,
        "load_percentage": "0%",
        "instances_detail": [],
    }
