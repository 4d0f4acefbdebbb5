from __future__ import annotations

import threading

import pytest

from agentperf_redis.command import Batch, Command, Flow, Pause, Wait, WakeUp, whole_number
from agentperf_redis.errors import AgentPerfError, LeaseLost
from agentperf_redis.script import Script
from agentperf_redis.script_header import parse_header


@pytest.mark.parametrize(("text", "number"), [("0", 0), (b"12", 12), ("9" * 16, 10**16 - 1), (None, 0)])
def test_stored_whole_number_is_decoded(text: str | bytes | None, number: int) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize("text", ["", "-1", "+1", "1_0", " 1", "1.5", "nan", "inf", "1e4", "9" * 17, "\u0663", b"\xff"])
def test_other_text_is_no_whole_number(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="whole number"):
        whole_number(text)


def echo(key: str) -> Command[int]:
    return Command("ECHO", (key,), (), int)


def flow() -> Flow[int]:
    first = yield from echo("a")
    yield from Pause(0.5)
    results = yield from Batch((echo("b"), echo("c")))
    return first + sum(results)


def test_flow_runs_with_send_alone() -> None:
    running = flow()
    assert next(running) == echo("a")
    assert running.send(1) == Pause(0.5)
    assert running.send(None) == Batch((echo("b"), echo("c")))
    with pytest.raises(StopIteration) as done:
        running.send([2, 3])
    assert done.value.value == 6


def test_batch_raises_first_error_settled_returns_all() -> None:
    lost = LeaseLost("p", "t", "gone")
    batch = Batch((echo("b"), echo("c")))
    running = iter(batch)
    next(running)
    with pytest.raises(LeaseLost):
        running.send([1, lost])
    settled = batch.settled()
    next(settled)
    with pytest.raises(StopIteration) as done:
        settled.send([1, lost])
    results: list[int | AgentPerfError] = done.value.value
    assert results == [1, lost]


def test_wake_up_is_sticky_until_reset() -> None:
    wake_up, seen = WakeUp(), threading.Event()
    wake_up.call_when_sent(seen.set)
    assert not seen.is_set()
    thread = threading.Thread(target=wake_up.send)
    thread.start()
    thread.join()
    assert seen.is_set()
    again: list[int] = []
    wake_up.call_when_sent(lambda: again.append(1))
    assert again == [1]
    wake_up.reset()
    wake_up.call_when_sent(lambda: again.append(2))
    assert again == [1]
    assert Wait(wake_up, 1.0).seconds == 1.0


def test_script_header_is_parsed() -> None:
    header = parse_header(Script("namespace/open").source)
    assert header.purpose.startswith("open: read a namespace's schema version and epoch")
    assert [(slot.name, slot.type) for slot in header.keys] == [("meta", "HASH")]
    assert [slot.name for slot in header.argv] == ["schema", "epoch"]
    assert set(header.notes) == {"RETURNS", "REPEAT", "ERRORS", "COST"}
