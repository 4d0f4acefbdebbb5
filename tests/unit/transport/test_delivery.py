"""Tests of the retry loop without a server: a simulated driver answers the steps of `deliver`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hiredis
import pytest

from agentperf_redis.command import Arg, Command
from agentperf_redis.errors import BackendFull, BackendUnavailable, CorruptState, ScriptFailed
from agentperf_redis.keys import key_slot
from agentperf_redis.script import Script
from agentperf_redis.transport.address import parse_url
from agentperf_redis.transport.delivery import Backoff, DeliveryFlow, Exchange, ExchangeFailed, deliver, deliver_opened
from agentperf_redis.transport.resp import ServerError
from agentperf_redis.transport.topology import Node, Topology

SCRIPT = Script("namespace/open")
RELEASE_CLAIM = Script("cache/release_claim")
Answer = list[Any] | ExchangeFailed
ONE_SERVER = Topology(parse_url("redis://h:1/0"))


def echo(key: str) -> Command[bytes]:
    return Command("ECHO", (key,), ("first",), lambda reply: reply)


def of_several_keys(key: str) -> Command[int]:
    args = dict.fromkeys(("token", "outcome", "error", "bus", "origin", "key"), "x") | {"error_ms": 1, "tagged": 0}
    ordered = {slot.name: args[slot.name] for slot in RELEASE_CLAIM.header.argv}
    return Command(
        RELEASE_CLAIM, (f"{{{key}}}:l:x", f"{{{key}}}:e:x", f"{{{key}}}:epochs"), ordered, lambda reply: reply
    )


def requests(payload: bytes) -> list[list[bytes]]:
    """Return the words of each command of a pipeline."""
    reader = hiredis.Reader()
    reader.feed(payload)
    commands: list[Any] = []
    while command := reader.gets():
        commands.append(command)
    return commands


def scripted(key: str, resend: dict[str, Arg] | None = None) -> Command[int]:
    return Command(SCRIPT, (f"{key}:meta",), {"schema": 1, "epoch": "first"}, lambda reply: reply, resend)


class Clock:
    """A simulated clock. Only backoffs advance it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(
    commands: list[Command[Any]], topology: Topology, clock: Clock, answer: Callable[[Exchange], Answer]
) -> tuple[list[Any], list[Exchange]]:
    """Drive a delivery: get replies from `answer`. Return the results and all exchanges."""
    results: list[Any] = [None] * len(commands)
    delivery: DeliveryFlow = deliver(commands, topology, 5.0, results.__setitem__, None, clock)
    exchanges: list[Exchange] = []
    try:
        step = next(delivery)
        while True:
            if isinstance(step, Backoff):
                clock.now += step.seconds
                step = delivery.send(None)
                continue
            exchanges.append(step)
            reply = answer(step)
            step = delivery.throw(reply) if isinstance(reply, ExchangeFailed) else delivery.send(reply)
    except StopIteration:
        return results, exchanges


def run(
    commands: list[Command[Any]], answers: list[Answer], url: str = "redis://h:1/0"
) -> tuple[list[Any], list[Exchange]]:
    clock = Clock()
    left = iter(answers)
    return drive(commands, Topology(parse_url(url)), clock, lambda _: next(left))


def test_replies_are_decoded_in_order() -> None:
    results, exchanges = run([echo("a"), echo("b")], [[b"1", b"2"]])
    assert results == [b"1", b"2"]
    assert [(step.node, step.count) for step in exchanges] == [(Node("h", 1), 2)]


def test_only_the_unknown_script_is_resent_as_source() -> None:
    results, exchanges = run([scripted("a"), echo("b")], [[ServerError("NOSCRIPT No matching script."), b"2"], [[1]]])
    assert results == [[1], b"2"]
    assert b"EVALSHA" in exchanges[0].payload
    assert exchanges[1].count == 1
    assert SCRIPT.source.encode() in exchanges[1].payload


UNKNOWN = ServerError("NOSCRIPT No matching script.")


class ScriptedNode:
    """A simulated node that knows a script only after an EVAL. A `forgetful` node forgets the script at once, like a
    proxy that sends each command to another server."""

    def __init__(self, *, forgetful: bool = False) -> None:
        self.evals: list[int] = []
        """For each pipeline, the number of its commands that contain the source of the script."""
        self._known = False
        self._forgetful = forgetful

    def __call__(self, step: Exchange) -> Answer:
        replies: list[Any] = []
        self.evals.append(0)
        for name in re.findall(rb"\r\n(EVALSHA|EVAL)\r\n", step.payload):
            if name == b"EVAL":
                self.evals[-1] += 1
                self._known = not self._forgetful
            replies.append([1] if name == b"EVAL" or self._known else UNKNOWN)
        assert len(replies) == step.count
        return replies


@pytest.mark.parametrize(("count", "pipelines"), [(500, [0, 1]), (1200, [0, 1, 0, 0])])
def test_batch_sends_an_unknown_script_once(count: int, pipelines: list[int]) -> None:
    node = ScriptedNode()
    results, exchanges = drive([scripted(f"k{n}") for n in range(count)], ONE_SERVER, Clock(), node)
    assert results == [[1]] * count
    assert node.evals == pipelines
    assert sum(len(step.payload) for step in exchanges) < count * 400 + len(SCRIPT.source)


def test_every_command_carries_its_script_behind_a_proxy() -> None:
    node = ScriptedNode(forgetful=True)
    results, _ = drive([scripted(f"k{n}") for n in range(500)], ONE_SERVER, Clock(), node)
    assert results == [[1]] * 500
    assert node.evals == [0, 1, 499]


def test_broken_batch_repeats_only_unanswered_commands() -> None:
    """The node restarts empty in the middle of the pipeline that loads the script."""
    answers: list[Answer] = [
        [UNKNOWN] * 4,
        ExchangeFailed("reset", sent=True, replies=[[1], [2]]),
        [UNKNOWN, UNKNOWN],
        [[3], [4]],
    ]
    results, exchanges = run([scripted(f"k{n}", {"epoch": "again"}) for n in range(4)], answers)
    assert results == [[1], [2], [3], [4]]
    assert [step.payload.count(SCRIPT.source.encode()) for step in exchanges] == [0, 1, 0, 1]
    assert [step.payload.count(b"again") for step in exchanges] == [0, 0, 2, 2]


def test_each_node_gets_an_unknown_script_once() -> None:
    nodes = {Node("n1", 1): ScriptedNode(), Node("n2", 2): ScriptedNode()}

    def answer(step: Exchange) -> Answer:
        return [LAYOUT] if step.node.host == "seed" else nodes[step.node](step)

    commands = [scripted(f"k{n}") for n in range(100)]
    results, _ = drive(commands, Topology(parse_url("redis+cluster://seed:7")), Clock(), answer)
    assert results == [[1]] * 100
    assert [node.evals for node in nodes.values()] == [[0, 1], [0, 1]]


def test_retry_after_lost_reply_uses_resend_arguments() -> None:
    results, exchanges = run([scripted("a", {"epoch": "again"})], [ExchangeFailed("reset", sent=True), [b"late"]])
    assert results == [b"late"]
    assert b"first" in exchanges[0].payload
    assert b"again" in exchanges[1].payload
    assert b"first" not in exchanges[1].payload


def test_retry_of_unsent_command_keeps_first_arguments() -> None:
    _, exchanges = run([scripted("a", {"epoch": "again"})], [ExchangeFailed("refused", sent=False), [b"1"]])
    assert b"first" in exchanges[1].payload


@pytest.mark.parametrize(("sent", "outcome"), [(True, "unknown"), (False, "not_applied")])
def test_deadline_error_states_the_known_outcome(sent: bool, outcome: str) -> None:
    clock = Clock()

    def answer(step: Exchange) -> Answer:
        clock.now += step.timeout_s
        return ExchangeFailed("silence", sent=sent)

    (error,), exchanges = drive([echo("a")], Topology(parse_url("redis://u:secret@h:1/0")), clock, answer)
    assert isinstance(error, BackendUnavailable)
    assert error.outcome == outcome
    assert "silence" in str(error)
    assert "secret" not in str(error)
    assert clock.now - 100.0 == pytest.approx(5.0, abs=0.01)
    assert len(exchanges) > 2, "one unanswered attempt must not use up the whole deadline"


def test_answered_commands_are_not_resent_after_break() -> None:
    results, exchanges = run(
        [echo("a"), echo("b"), echo("c")], [ExchangeFailed("reset", sent=True, replies=[b"1"]), [b"2", b"3"]]
    )
    assert results == [b"1", b"2", b"3"]
    assert [step.count for step in exchanges] == [3, 2]


def test_refused_handshake_is_not_retried() -> None:
    (error,), exchanges = run([echo("a")], [ExchangeFailed("WRONGPASS", sent=False, final=True)])
    assert isinstance(error, BackendUnavailable)
    assert error.outcome == "not_applied"
    assert len(exchanges) == 1


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
def test_transient_errors_are_retried(text: str) -> None:
    results, exchanges = run([echo("a")], [[ServerError(text)], [ServerError(text)], [b"1"]])
    assert results == [b"1"]
    assert len(exchanges) == 3


def test_permanent_errors_are_raised_at_once() -> None:
    results, exchanges = run(
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
    assert len(exchanges) == 1


def test_wrong_type_error_names_the_key() -> None:
    (error,), exchanges = run([scripted("ns")], [[ServerError("WRONGTYPE Operation")], [b"string"]])
    assert isinstance(error, CorruptState)
    assert error.key == "ns:meta"
    assert "a string where a hash belongs" in str(error)
    assert b"TYPE" in exchanges[1].payload


def test_failing_decoder_affects_only_its_command() -> None:
    def refuse(reply: object) -> object:
        raise CorruptState("k", f"{reply!r}")

    results, _ = run([Command("ECHO", ("a",), (), refuse), echo("b")], [[b"1", b"2"]])
    assert isinstance(results[0], CorruptState)
    assert results[1] == b"2"


LAYOUT = [[0, 8191, [b"n1", 1, b"id1"]], [8192, 16383, [b"n2", 2, b"id2"]]]


def test_cluster_commands_are_routed_by_the_layout() -> None:
    low, high = "b", "a"  # slots 3300 and 15495
    assert key_slot(low) < 8192 <= key_slot(high)
    results, exchanges = run([echo(low), echo(high)], [[LAYOUT], [b"low"], [b"high"]], "redis+cluster://seed:7")
    assert results == [b"low", b"high"]
    assert [step.node for step in exchanges] == [Node("seed", 7), Node("n1", 1), Node("n2", 2)]


def test_moved_reply_refreshes_the_layout() -> None:
    moved = [[0, 16383, [b"n2", 2, b"id2"]]]
    results, exchanges = run(
        [echo("b")], [[LAYOUT], [ServerError("MOVED 3300 n2:2")], [moved], [b"there"]], "redis+cluster://seed:7"
    )
    assert results == [b"there"]
    assert exchanges[-1].node == Node("n2", 2)


def test_ask_redirect_is_followed_once_with_asking() -> None:
    results, exchanges = run(
        [echo("b")], [[LAYOUT], [ServerError("ASK 3300 n2:2")], [b"OK", b"there"]], "redis+cluster://seed:7"
    )
    assert results == [b"there"]
    assert exchanges[-1].node == Node("n2", 2)
    assert b"ASKING" in exchanges[-1].payload
    assert exchanges[-1].count == 2


def test_ask_redirect_resends_unknown_script_as_source() -> None:
    ask = ServerError("ASK 3300 n2:2")
    unknown = ServerError("NOSCRIPT No matching script.")
    results, exchanges = run(
        [scripted("b")], [[LAYOUT], [ask], [b"OK", unknown], [ask], [b"OK", [1]]], "redis+cluster://seed:7"
    )
    assert results == [[1]]
    assert SCRIPT.source.encode() in exchanges[-1].payload


CLUSTER = "redis+cluster://seed:7"
ASK, TRYAGAIN = ServerError("ASK 3300 n2:2"), ServerError("TRYAGAIN Multiple keys request during rehashing of slot")


@pytest.mark.parametrize("reply", [ASK, TRYAGAIN])
def test_script_of_several_keys_waits_for_its_slot(reply: ServerError) -> None:
    """On the node that ASK names, the script would miss the keys that have not been moved yet."""
    moved = [[0, 16383, [b"n2", 2, b"id2"]]]
    results, exchanges = run(
        [of_several_keys("b")],
        [[LAYOUT], [reply], [reply], [reply], [ServerError("MOVED 3300 n2:2")], [moved], [[1]]],
        CLUSTER,
    )
    assert results == [[1]]
    calls = [step for step in exchanges if b"SLOTS" not in step.payload]
    assert [step.node.host for step in calls] == ["n1", "n1", "n1", "n1", "n2"]
    assert not any(b"ASKING" in step.payload for step in exchanges)


@pytest.mark.parametrize("reply", [ASK, TRYAGAIN])
def test_script_whose_slot_stays_open_is_not_applied(reply: ServerError) -> None:
    (error,), exchanges = drive(
        [of_several_keys("b")],
        Topology(parse_url(CLUSTER)),
        Clock(),
        lambda step: [LAYOUT] if b"SLOTS" in step.payload else [reply],
    )
    assert isinstance(error, BackendUnavailable)
    assert error.outcome == "not_applied"
    assert "the slot is being moved" in str(error)
    assert len(exchanges) > 10


def test_redirected_command_leaves_its_pipeline() -> None:
    results, exchanges = run(
        [echo("b"), of_several_keys("b"), scripted("{b}"), echo("b")],
        [[LAYOUT], [ASK, ASK, ASK, b"4"], [[2]], [b"OK", b"1", b"OK", [3]]],
        CLUSTER,
    )
    assert results == [b"1", [2], [3], b"4"]
    assert [(step.node.host, step.count) for step in exchanges] == [("seed", 1), ("n1", 4), ("n1", 1), ("n2", 4)]


def test_open_slot_holds_up_no_other_slot() -> None:
    """The script's source is sent with a command that the node runs, not with a command that waits for its slot."""
    times_sent = 0

    def answer(step: Exchange) -> Answer:
        nonlocal times_sent
        if b"SLOTS" in step.payload:
            return [LAYOUT]
        times_sent += b"{c}:absent" in step.payload
        return [
            TRYAGAIN if b"{b}:absent" in request else [1] if request[0] == b"EVAL" else UNKNOWN
            for request in requests(step.payload)
        ]

    (blocked, free), _ = drive(
        [of_several_keys("b"), of_several_keys("c")], Topology(parse_url(CLUSTER)), Clock(), answer
    )
    assert isinstance(blocked, BackendUnavailable)
    assert free == [1]
    assert times_sent == 2


@pytest.mark.parametrize(
    ("url", "command", "declared"),
    [
        (CLUSTER, of_several_keys("b"), [b"{b}:l:x", b"{b}:e:x", b"{b}:epochs", b"{b}:absent"]),
        ("redis://h:1/0", of_several_keys("b"), [b"{b}:l:x", b"{b}:e:x", b"{b}:epochs"]),
        (CLUSTER, scripted("b"), [b"b:meta"]),
        ("redis://h:1/0", scripted("b"), [b"b:meta"]),
    ],
)
def test_scripts_of_several_keys_declare_an_absent_key(url: str, command: Command[int], declared: list[bytes]) -> None:
    """The absent key makes the server refuse these scripts while the slot is being moved."""
    answers: list[Answer] = [[LAYOUT], [ServerError("NOSCRIPT No matching script.")], [[1]]]
    _, exchanges = run([command], answers if url == CLUSTER else answers[1:], url)
    sent = [requests(step.payload)[0] for step in exchanges[-2:]]
    assert [request[0] for request in sent] == [b"EVALSHA", b"EVAL"]
    for request in sent:
        assert request[2:3] + request[3 : 3 + len(declared)] == [str(len(declared)).encode(), *declared]


@pytest.mark.parametrize(
    "text",
    [
        "ERR Attempted to access a non local key in a cluster node script: on @user_script:1.",  # Valkey 9.1
        "ERR Script attempted to access a non local key in a cluster node script: 898113, on @user_script:1.",  # Redis 8.2
        (
            "ERR Unable to execute command 'exists' in script because undeclared keys were accessed during rehashing of "
            "the slot script: 38650e, on @user_script:1."
        ),  # Redis 8.2
        "CORRUPT ns:{metrics:01}:settings something else (ERR Attempted to access a non local key in a cluster node)",
        "ERR Script attempted to execute a write command while the cluster is down and readonly",  # Redis 8.2
        "ERR Can not execute a command 'get' while the cluster is down",  # Valkey 9.1
    ],
)
def test_script_broken_off_by_a_slot_move_is_retried(text: str) -> None:
    refused = ServerError(text)
    command = scripted("a", {"epoch": "again"})
    results, exchanges = run([command], [[LAYOUT], [refused], [refused], [[1]]], CLUSTER)
    assert results == [[1]]
    assert b"again" in exchanges[-1].payload, "it may have been applied in part"
    (error,), _ = drive(
        [command],
        Topology(parse_url(CLUSTER)),
        Clock(),
        lambda step: [LAYOUT] if b"SLOTS" in step.payload else [refused],
    )
    assert isinstance(error, BackendUnavailable)
    assert error.outcome == "unknown"
    assert text in str(error)


def test_dead_seeds_are_skipped() -> None:
    results, exchanges = run(
        [echo("b")], [ExchangeFailed("refused", sent=False), [LAYOUT], [b"1"]], "redis+cluster://dead:7,alive:8"
    )
    assert results == [b"1"]
    assert [step.node.host for step in exchanges] == ["dead", "alive", "n1"]


def test_sentinel_provides_the_primary() -> None:
    results, exchanges = run([echo("b")], [[[b"10.0.0.9", b"6380"]], [b"1"]], "redis+sentinel://s1:26379/mymaster/2")
    assert results == [b"1"]
    assert exchanges[0].node == Node("s1", 26379, sentinel=True)
    assert exchanges[1].node == Node("10.0.0.9", 6380)


def test_failed_primary_is_looked_up_again() -> None:
    results, exchanges = run(
        [echo("b")],
        [[[b"old", b"1"]], ExchangeFailed("reset", sent=True), [[b"new", b"2"]], [b"1"]],
        "redis+sentinel://s1:26379/mymaster",
    )
    assert results == [b"1"]
    assert [step.node.host for step in exchanges] == ["s1", "old", "s1", "new"]


def test_slots_follow_the_cluster_specification() -> None:
    # The check value for CRC16/XMODEM and the examples of hash tags are from the Redis Cluster specification.
    assert key_slot("123456789") == 0x31C3
    assert key_slot("{user1000}.following") == key_slot("{user1000}.followers") == key_slot("user1000")
    assert key_slot("foo{}{bar}") != key_slot("bar")
    assert key_slot("foo{{bar}}zap") == key_slot("{bar")
    assert key_slot("foo{bar}{zap}") == key_slot("bar")


def opened(opening_answer: Answer) -> tuple[list[Any], list[bytes], int]:
    """Deliver two commands after an opening command.

    Return the results of the two commands, the sent payloads, and how often `opened` was called.
    """
    topology = Topology(parse_url("redis://server"))
    results: list[Any] = [None, None]
    sent: list[bytes] = []
    openings: list[int] = []
    flow = deliver_opened(
        Command("ECHO", ("opening",), (), _accepted),
        [echo("a"), echo("b")],
        topology,
        1.0,
        results.__setitem__,
        None,
        lambda: openings.append(1),
    )
    try:
        step = next(flow)
        while True:
            assert isinstance(step, Exchange)
            sent.append(step.payload)
            first = len(sent) == 1
            step = flow.send(opening_answer if first else [b"answer"] * step.count)
    except StopIteration:
        return results, sent, len(openings)


def _accepted(reply: Any) -> None:
    if reply != b"welcome":
        raise CorruptState("n:meta", "something else")


def test_opening_is_sent_first_and_once() -> None:
    results, sent, openings = opened([b"welcome"])
    assert (results, len(sent), openings) == ([b"answer", b"answer"], 2, 1)
    assert b"opening" in sent[0]


def test_failed_opening_prevents_all_other_commands() -> None:
    results, sent, openings = opened([b"go away"])
    assert [type(result) for result in results] == [CorruptState, CorruptState]
    assert (len(sent), openings) == (1, 0)
