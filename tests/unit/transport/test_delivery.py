"""The retry loop without a server: a scripted driver answers what `deliver` asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis.command import Arg, Command
from agentperf_redis.errors import BackendFull, BackendUnavailable, CorruptState, ScriptFailed
from agentperf_redis.script import Script
from agentperf_redis.transport.address import parse_url
from agentperf_redis.transport.delivery import Backoff, DeliveryFlow, Exchange, ExchangeFailed, deliver, deliver_opened
from agentperf_redis.transport.resp import ServerError
from agentperf_redis.transport.topology import Node, Topology, key_slot

SCRIPT = Script("namespace/open")
Answer = list[Any] | ExchangeFailed


def echo(key: str) -> Command[bytes]:
    return Command("ECHO", (key,), ("first",), lambda reply: reply)


def scripted(key: str, resend: dict[str, Arg] | None = None) -> Command[int]:
    return Command(SCRIPT, (f"{key}:meta",), {"schema": 1, "epoch": "first"}, lambda reply: reply, resend)


class Clock:
    """A clock that rests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(
    commands: list[Command[Any]], topology: Topology, clock: Clock, answer: Callable[[Exchange], Answer]
) -> tuple[list[Any], list[Exchange]]:
    """Play the driver; returns the results and all exchanges asked for."""
    results: list[Any] = [None] * len(commands)
    delivery: DeliveryFlow = deliver(commands, topology, 5.0, results.__setitem__, None, clock)
    asked: list[Exchange] = []
    try:
        step = next(delivery)
        while True:
            if isinstance(step, Backoff):
                clock.now += step.seconds
                step = delivery.send(None)
                continue
            asked.append(step)
            given = answer(step)
            step = delivery.throw(given) if isinstance(given, ExchangeFailed) else delivery.send(given)
    except StopIteration:
        return results, asked


def run(
    commands: list[Command[Any]], answers: list[Answer], url: str = "redis://h:1/0"
) -> tuple[list[Any], list[Exchange]]:
    clock = Clock()
    left = iter(answers)
    return drive(commands, Topology(parse_url(url)), clock, lambda _: next(left))


def test_replies_are_decoded_in_order() -> None:
    results, asked = run([echo("a"), echo("b")], [[b"1", b"2"]])
    assert results == [b"1", b"2"]
    assert [(step.node, step.count) for step in asked] == [(Node("h", 1), 2)]


def test_an_unknown_script_is_sent_whole_and_only_that_one() -> None:
    results, asked = run([scripted("a"), echo("b")], [[ServerError("NOSCRIPT No matching script."), b"2"], [[1]]])
    assert results == [[1], b"2"]
    assert b"EVALSHA" in asked[0].payload
    assert asked[1].count == 1
    assert SCRIPT.source.encode() in asked[1].payload


def test_a_lost_reply_is_asked_for_again_with_the_arguments_for_a_repeat() -> None:
    results, asked = run([scripted("a", {"epoch": "again"})], [ExchangeFailed("reset", sent=True), [b"late"]])
    assert results == [b"late"]
    assert b"first" in asked[0].payload
    assert b"again" in asked[1].payload
    assert b"first" not in asked[1].payload


def test_what_was_never_sent_is_sent_with_its_first_arguments() -> None:
    _, asked = run([scripted("a", {"epoch": "again"})], [ExchangeFailed("refused", sent=False), [b"1"]])
    assert b"first" in asked[1].payload


@pytest.mark.parametrize(("sent", "outcome"), [(True, "unknown"), (False, "not_applied")])
def test_the_deadline_ends_it_and_says_what_is_known(sent: bool, outcome: str) -> None:
    clock = Clock()

    def answer(step: Exchange) -> Answer:
        clock.now += step.timeout_s
        return ExchangeFailed("silence", sent=sent)

    (error,), asked = drive([echo("a")], Topology(parse_url("redis://u:secret@h:1/0")), clock, answer)
    assert isinstance(error, BackendUnavailable)
    assert error.outcome == outcome
    assert "silence" in str(error)
    assert "secret" not in str(error)
    assert clock.now - 100.0 == pytest.approx(5.0, abs=0.01)
    assert len(asked) > 2, "one silent attempt must not use up the whole deadline"


def test_what_was_answered_before_a_break_is_not_sent_again() -> None:
    results, asked = run(
        [echo("a"), echo("b"), echo("c")], [ExchangeFailed("reset", sent=True, replies=[b"1"]), [b"2", b"3"]]
    )
    assert results == [b"1", b"2", b"3"]
    assert [step.count for step in asked] == [3, 2]


def test_a_refused_handshake_is_final() -> None:
    (error,), asked = run([echo("a")], [ExchangeFailed("WRONGPASS", sent=False, final=True)])
    assert isinstance(error, BackendUnavailable)
    assert error.outcome == "not_applied"
    assert len(asked) == 1


@pytest.mark.parametrize(
    "text",
    [
        "LOADING Redis is loading",
        "BUSY Redis is busy",
        "TRYAGAIN Multiple keys",
        "MASTERDOWN Link",
        "READONLY You can't",
    ],
)
def test_passing_trouble_is_waited_out(text: str) -> None:
    results, asked = run([echo("a")], [[ServerError(text)], [ServerError(text)], [b"1"]])
    assert results == [b"1"]
    assert len(asked) == 3


def test_an_error_that_stays_is_told_at_once() -> None:
    results, asked = run(
        [echo("a"), echo("b"), echo("c"), scripted("d")],
        [
            [
                ServerError("OOM command not allowed"),
                ServerError("NOPERM this user has no permissions"),
                ServerError("CORRUPT ns:{cache:x}:e:k a list"),
                ServerError("ERR user_script:1: attempt to index nil"),
            ]
        ],
    )
    assert [type(result) for result in results] == [BackendFull, BackendUnavailable, CorruptState, ScriptFailed]
    assert results[2].key == "ns:{cache:x}:e:k"
    assert results[3].operation == "namespace/open"
    assert len(asked) == 1


def test_a_wrong_type_names_the_key() -> None:
    (error,), asked = run([scripted("ns")], [[ServerError("WRONGTYPE Operation")], [b"string"]])
    assert isinstance(error, CorruptState)
    assert error.key == "ns:meta"
    assert "a string where a hash belongs" in str(error)
    assert b"TYPE" in asked[1].payload


def test_a_decoder_that_refuses_fails_its_own_command_only() -> None:
    def refuse(reply: object) -> object:
        raise CorruptState("k", f"{reply!r}")

    results, _ = run([Command("ECHO", ("a",), (), refuse), echo("b")], [[b"1", b"2"]])
    assert isinstance(results[0], CorruptState)
    assert results[1] == b"2"


LAYOUT = [[0, 8191, [b"n1", 1, b"id1"]], [8192, 16383, [b"n2", 2, b"id2"]]]


def test_a_cluster_is_asked_for_its_layout_and_commands_go_to_their_nodes() -> None:
    low, high = "b", "a"  # slots 3300 and 15495
    assert key_slot(low) < 8192 <= key_slot(high)
    results, asked = run([echo(low), echo(high)], [[LAYOUT], [b"low"], [b"high"]], "redis+cluster://seed:7")
    assert results == [b"low", b"high"]
    assert [step.node for step in asked] == [Node("seed", 7), Node("n1", 1), Node("n2", 2)]


def test_moved_asks_for_the_layout_again() -> None:
    moved = [[0, 16383, [b"n2", 2, b"id2"]]]
    results, asked = run(
        [echo("b")], [[LAYOUT], [ServerError("MOVED 3300 n2:2")], [moved], [b"there"]], "redis+cluster://seed:7"
    )
    assert results == [b"there"]
    assert asked[-1].node == Node("n2", 2)


def test_ask_is_followed_once_with_asking() -> None:
    results, asked = run(
        [echo("b")], [[LAYOUT], [ServerError("ASK 3300 n2:2")], [b"OK", b"there"]], "redis+cluster://seed:7"
    )
    assert results == [b"there"]
    assert asked[-1].node == Node("n2", 2)
    assert b"ASKING" in asked[-1].payload
    assert asked[-1].count == 2


def test_a_node_asked_by_redirection_may_not_know_the_script() -> None:
    ask = ServerError("ASK 3300 n2:2")
    unknown = ServerError("NOSCRIPT No matching script.")
    results, asked = run(
        [scripted("b")], [[LAYOUT], [ask], [b"OK", unknown], [ask], [b"OK", [1]]], "redis+cluster://seed:7"
    )
    assert results == [[1]]
    assert SCRIPT.source.encode() in asked[-1].payload


def test_dead_seeds_are_passed_over() -> None:
    results, asked = run(
        [echo("b")], [ExchangeFailed("refused", sent=False), [LAYOUT], [b"1"]], "redis+cluster://dead:7,alive:8"
    )
    assert results == [b"1"]
    assert [step.node.host for step in asked] == ["dead", "alive", "n1"]


def test_sentinel_names_the_primary() -> None:
    results, asked = run([echo("b")], [[[b"10.0.0.9", b"6380"]], [b"1"]], "redis+sentinel://s1:26379/mymaster/2")
    assert results == [b"1"]
    assert asked[0].node == Node("s1", 26379, sentinel=True)
    assert asked[1].node == Node("10.0.0.9", 6380)


def test_a_failed_primary_is_asked_for_again() -> None:
    results, asked = run(
        [echo("b")],
        [[[b"old", b"1"]], ExchangeFailed("reset", sent=True), [[b"new", b"2"]], [b"1"]],
        "redis+sentinel://s1:26379/mymaster",
    )
    assert results == [b"1"]
    assert [step.node.host for step in asked] == ["s1", "old", "s1", "new"]


def test_slots_follow_the_cluster_specification() -> None:
    # the specification's own check value for CRC16/XMODEM, and its examples of hash tags
    assert key_slot("123456789") == 0x31C3
    assert key_slot("{user1000}.following") == key_slot("{user1000}.followers") == key_slot("user1000")
    assert key_slot("foo{}{bar}") != key_slot("bar")
    assert key_slot("foo{{bar}}zap") == key_slot("{bar")
    assert key_slot("foo{bar}{zap}") == key_slot("bar")


def opened(opening_says: Answer) -> tuple[list[Any], list[bytes], int]:
    """Deliver two commands after an opening; return their results, what was sent, and how often it was opened."""
    topology = Topology(parse_url("redis://server"))
    results: list[Any] = [None, None]
    sent: list[bytes] = []
    times: list[int] = []
    flow = deliver_opened(
        Command("ECHO", ("opening",), (), _accepted),
        [echo("a"), echo("b")],
        topology,
        1.0,
        results.__setitem__,
        None,
        lambda: times.append(1),
    )
    try:
        step = next(flow)
        while True:
            assert isinstance(step, Exchange)
            sent.append(step.payload)
            first = len(sent) == 1
            step = flow.send(opening_says if first else [b"answer"] * step.count)
    except StopIteration:
        return results, sent, len(times)


def _accepted(reply: Any) -> None:
    if reply != b"welcome":
        raise CorruptState("n:meta", "something else")


def test_what_opens_comes_first_and_once() -> None:
    results, sent, times = opened([b"welcome"])
    assert (results, len(sent), times) == ([b"answer", b"answer"], 2, 1)
    assert b"opening" in sent[0]


def test_where_it_is_refused_nothing_else_is_sent() -> None:
    results, sent, times = opened([b"go away"])
    assert [type(result) for result in results] == [CorruptState, CorruptState]
    assert (len(sent), times) == (1, 0)
