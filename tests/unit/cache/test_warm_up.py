"""The flow of a warm-up, driven with `send()`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from agentperf_redis.cache import LRUCache
from agentperf_redis.cache.commands.claims import Lead
from agentperf_redis.cache.commands.entries import PutReply, PutResult
from agentperf_redis.cache.compute import Wanted
from agentperf_redis.cache.maintenance import Maintenance
from agentperf_redis.cache.warm_up import WarmUpStatus, _Count, warming
from agentperf_redis.command import Call, Command, Flow, Shielded, Step, Together
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.script import Script
from tests.support.renewed import Renewed


def counting(keys: str, function: Callable[[str], object] = str.upper, progress: Any = None) -> _Count:
    return _Count((Wanted[Any](key, partial(function, key)) for key in keys), len(keys), progress)


def together(cache: LRUCache, count: _Count, concurrency: int) -> tuple[Flow[None], tuple[Flow[object], ...]]:
    """Return the flow of a warm-up, and the flows that it runs concurrently."""
    flow = warming(count, cache._flows, cast("Maintenance", Renewed()), concurrency, blocking=True)
    step = next(flow)
    assert isinstance(step, Together)
    assert len(step.flows) == concurrency
    return flow, step.flows


def answer(step: Step) -> Any:
    """Answer a step with the result of the user's function, or with the reply of a server that stores no values."""
    if isinstance(step, Call):
        return step.function()
    if isinstance(step, Shielded):
        return drive(step.flow)
    assert isinstance(step, Command)
    name = step.script.name if isinstance(step.script, Script) else step.script
    answers: dict[str, Any] = {"MGET": [None, None], "cache/claim": Lead(1), "cache/release_claim": None}
    return PutReply(PutResult.STORED, 7) if name == "cache/put" else answers[name]


def drive(flow: Flow[Any]) -> Any:
    """Run a flow to its end."""
    try:
        step = next(flow)
        while True:
            try:
                reply = answer(step)
            except Exception as error:  # noqa: BLE001  thrown into the flow
                step = flow.throw(error)
            else:
                step = flow.send(reply)
    except StopIteration as done:
        return done.value


def test_flows_share_keys_and_compute_each_once(deployed: LRUCache) -> None:
    reports: list[WarmUpStatus] = []
    count = counting("abc", progress=reports.append)
    flow, (first, second) = together(deployed, count, 2)

    assert isinstance(next(first), Command)  # the first flow has taken "a"
    drive(second)
    assert [warmed.done for warmed in reports] == [1, 2], "the second flow has computed the others"
    first.close()

    with pytest.raises(StopIteration):
        flow.send(None)


def test_function_error_is_recorded_by_key(deployed: LRUCache) -> None:
    def work(key: str) -> str:
        if key == "b":
            raise StopIteration
        return key

    count = counting("abc", work)
    flow, (only,) = together(deployed, count, 1)
    drive(only)
    with pytest.raises(StopIteration):
        flow.send(None)

    warmed = count.result()
    assert (warmed.done, warmed.total, warmed.computed) == (3, 3, 2)
    assert {key: type(error) for key, error in warmed.errors.items()} == {"b": StopIteration}


@pytest.mark.parametrize("ended_by", ["server away", "progress", "cancelled"])
def test_failing_flow_ends_all_flows(deployed: LRUCache, ended_by: str) -> None:
    def progress(warmed: WarmUpStatus) -> None:
        if ended_by == "progress":
            raise StopIteration(warmed.done)

    errors = {"server away": BackendUnavailable("x", "unknown", "down"), "cancelled": asyncio.CancelledError()}
    count = counting("abc", progress=progress)
    flow, (first, second) = together(deployed, count, 2)
    next(first)
    if ended_by == "progress":
        with pytest.raises(RuntimeError):
            drive(second)
    else:
        with pytest.raises(type(errors[ended_by])):
            first.throw(errors[ended_by])
        assert drive(second) is None
    assert count.report().done == (1 if ended_by == "progress" else 0), "no further value is started"

    if ended_by == "cancelled":
        with pytest.raises(asyncio.CancelledError):
            flow.throw(errors[ended_by])
    else:
        with pytest.raises(StopIteration):
            flow.throw(RuntimeError("what a driver met"))
    expected = {"server away": BackendUnavailable, "progress": StopIteration, "cancelled": asyncio.CancelledError}
    with pytest.raises(expected[ended_by]):
        count.result()
