"""Delivery of commands despite faults: retries, routing and the interpretation of errors.

`deliver` is a generator without I/O. It yields steps: an `Exchange` of bytes with a node, or a `Backoff`. A driver does
the I/O of each step and sends the replies back. So the blocking driver and the asyncio driver share the retry loop, the
Cluster routing and the interpretation of errors. The retries of redis-py are off: they repeat a request up to 11 times
without notice, and in a Cluster without a pause.

A retry is safe: a mutating script of this library does no harm if it is delivered twice, late, or after its caller gave
up. The header of each script explains why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import (
    AgentPerfError,
    BackendFull,
    BackendUnavailable,
    CorruptState,
    RequestOutcome,
    ScriptFailed,
)
from agentperf_redis.random_numbers import uniform
from agentperf_redis.script import Script
from agentperf_redis.transport.breaker import Breaker
from agentperf_redis.transport.resp import ServerError, needs_whole_slot, pack, pack_call
from agentperf_redis.transport.topology import Node, Topology

PIPELINE_COMMANDS = 512
PIPELINE_BYTES = 4 * 1024 * 1024
"""Maximum commands and maximum argument bytes per pipeline. Longer pipelines are split."""

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.004, 0.25
_SPLIT_ABOVE_S = 0.5
"""If more seconds than this are left until the deadline, an attempt may use only half of the remaining time.

So one lost packet does not use up the whole deadline.
"""

_SLOT_MOVES = "the slot is being moved (`redis-cli --cluster fix` ends an interrupted move)"
_TRANSIENT = {
    "BUSY": "it is busy with a slow script",
    "CLUSTERDOWN": "the Cluster is down",
    "ERR max number of clients": "it has reached its maxclients",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "the replica has lost its primary",
    "MISCONF": "it cannot save to disk and refuses writes (see its log)",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write",
    "READONLY": "it is a read-only replica",
    "TRYAGAIN": _SLOT_MOVES,
    "UNBLOCKED": "it is failing over",
}
"""Prefix of a transient error reply -> its meaning.

A command with such a reply was not applied, so it is retried until the deadline.
"""

_TRANSIENT_IN_SCRIPT = {
    "access a non local key": _SLOT_MOVES,
    "undeclared keys were accessed during rehashing": _SLOT_MOVES,
    "attempted to access a slot not served": "the Cluster is down",
    "while the cluster is down": "the Cluster is down",
}
"""Text in a transient error that one command of a script can cause -> the meaning of the error.

The errors of different servers differ before and after this text. A script may put the error into its own error reply.
The script may have written something before the failed command, so a retry has to repair it.
"""

_REFUSED = {
    "DENIED": "it is in protected mode",
    "NOAUTH": "it needs a password: put it into the URL, redis://:password@host",
    "NOPERM": "the ACL user may not do this",
    "WRONGPASS": "user name or password are wrong",
    "ERR ACL failure in script": "the ACL user may not do all that the script does",
    "ERR The user executing the script": "the ACL user may not do all that the script does",
    "ERR AUTH": "it has no password, but the URL has one",
    "ERR invalid password": "the password is wrong",
    "ERR DB index": "it has no such database",
    "ERR SELECT": "it has no such database",
}
"""Prefix of a permanent error reply -> its meaning. A retry would not help."""


class ExchangeFailed(Exception):
    """Raised by drivers: a node was unreachable or did not answer in time.

    Attributes:
        reason: description of the fault.
        sent: whether anything may have reached the server.
        final: whether a retry is pointless, for example after a refused handshake.
        stale: whether an idle connection broke before any reply. If so, an immediate retry on a new connection may
            succeed.
        timed_out: whether the fault is only that no answer came in time.
        local: whether the fault is in this process, so that the node may be healthy.
        replies: the replies that arrived before the fault.
        error: the error to raise to callers instead of BackendUnavailable.
    """

    def __init__(
        self,
        reason: str,
        *,
        sent: bool,
        final: bool = False,
        stale: bool = False,
        timed_out: bool = False,
        local: bool = False,
        replies: Sequence[Reply] = (),
        error: AgentPerfError | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent
        self.final = final
        self.stale = stale
        self.timed_out = timed_out
        self.local = local
        self.replies = replies
        self.error = error


@dataclass(slots=True)  # not frozen: a frozen object takes twice as long to create, and each command creates one
class Exchange:
    """Send `payload` to `node` and return its `count` replies, all within `timeout_s` seconds."""

    node: Node
    payload: bytes
    count: int
    timeout_s: float


class Backoff(NamedTuple):
    """Wait for `seconds` before the next step."""

    seconds: float


DeliveryStep: TypeAlias = Exchange | Backoff
DeliveryFlow: TypeAlias = Generator[DeliveryStep, Any, None]
Settle: TypeAlias = Callable[[int, Any], None]
"""Called with the index of a command and its result, as soon as the result is known."""


class _Item:
    """One command of a delivery, with the state of its retries."""

    __slots__ = ("at_once", "by_source", "command", "index", "maybe_applied", "node", "reason", "unresponsive")

    def __init__(self, index: int, command: Command[Any]) -> None:
        self.index = index
        self.command = command
        self.by_source = False
        """Whether to send the source of the script instead of its hash. Once set, it stays set."""
        self.at_once = False
        """Whether to retry the command without a backoff."""
        self.maybe_applied = False
        self.node: Node | None = None
        """The node for the next attempt only, set by an ASK redirect."""
        self.reason = ""
        self.unresponsive: Node | None = None
        """The node that did not answer the last attempt."""


def deliver(
    commands: Sequence[Command[Any]],
    topology: Topology,
    deadline_s: float,
    settle: Settle,
    breaker: Breaker | None = None,
    now: Callable[[], float] = time.monotonic,
) -> DeliveryFlow:
    """Deliver commands and decode their replies.

    Args:
        commands: the commands to run. They are not atomic: each command succeeds or fails on its own.
        topology: maps keys to nodes.
        deadline_s: seconds for all commands together.
        settle: called once for each command, with its decoded reply or its AgentPerfError.
        breaker: knows the nodes that do not answer; None tries all nodes.
        now: the clock.
    """
    end = now() + deadline_s
    waiting: list[_Item] = []
    backoffs = 0
    single = commands[0] if len(commands) == 1 and not topology.doubtful and not (breaker and breaker.open) else None
    node = topology.node_for(single.keys[0] if single.keys else None) if single is not None else None
    if single is not None and node is not None:
        # The fast path for one command. If the command does not succeed at once, the general path below continues.
        broken, replies = None, ()
        try:
            replies = yield Exchange(
                node,
                pack_call(single, by_source=False, again=False, scattered=topology.scattered),
                1,
                _attempt_timeout(deadline_s),
            )
        except ExchangeFailed as failed:
            broken = failed
        else:
            if not isinstance(replies[0], ServerError):
                settle(0, _decoded(single, replies[0]))
                return
        context = _Context(topology, end, settle, now)
        yield from _take(node, [_Item(0, single)], replies, broken, context, waiting)
        if waiting and not waiting[0].at_once:
            yield Backoff(uniform(0, min(_FIRST_BACKOFF_S, max(0.0, context.left()))))
    else:
        context = _Context(topology, end, settle, now)
        waiting = [_Item(index, command) for index, command in enumerate(commands)]
        if breaker and breaker.open:
            waiting = [item for item in waiting if not _refused(item, breaker, context)]
    while waiting:
        if context.left() <= 0:
            for item in waiting:
                reason = topology.located(item.unresponsive, item.reason or "no time was left to send it")
                context.give_up(item, f"{reason}; gave up after {deadline_s:g} s")
            for node in {item.unresponsive for item in waiting}:
                if breaker is not None and node is not None:
                    breaker.suspect(node, deadline_s)
            return
        waiting, backoff = yield from _round(waiting, context)
        if backoff and waiting:
            # Full jitter (Brooker, "Exponential backoff and jitter"): many clients must not retry at the same time.
            pause = uniform(0, min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2**backoffs))
            backoffs = min(backoffs + 1, 16)
            yield Backoff(min(pause, max(0.0, context.left())))


def deliver_opened(
    opening: Command[None],
    commands: Sequence[Command[Any]],
    topology: Topology,
    deadline_s: float,
    settle: Settle,
    breaker: Breaker | None,
    opened: Callable[[], None],
) -> DeliveryFlow:
    """Deliver an opening command, then the others. If the opening command fails, all the others fail with its error.

    Args:
        opening: the first command. Its deadline is `deadline_s`, separate from the deadline of the others.
        commands: as for `deliver`.
        topology: as for `deliver`.
        deadline_s: as for `deliver`.
        settle: as for `deliver`.
        breaker: as for `deliver`.
        opened: called after the opening command succeeded.
    """
    results: list[Any] = [None]
    yield from deliver((opening,), topology, deadline_s, results.__setitem__, breaker)
    if isinstance(results[0], AgentPerfError):
        for index in range(len(commands)):
            settle(index, results[0])
        return
    opened()
    yield from deliver(commands, topology, deadline_s, settle, breaker)


def _refused(item: _Item, breaker: Breaker, context: _Context) -> bool:
    keys = item.command.keys
    refusal = breaker.refusal(context.topology.node_for(keys[0] if keys else None))
    if refusal is not None:
        context.settle(item.index, refusal)
    return refusal is not None


def _attempt_timeout(left_s: float) -> float:
    return left_s / 2 if left_s > _SPLIT_ABOVE_S else left_s


class _Context:
    """The shared state of one delivery."""

    def __init__(self, topology: Topology, end: float, settle: Settle, now: Callable[[], float]) -> None:
        self.topology = topology
        self.settle = settle
        self.lacking: set[tuple[Node, str]] = set()
        """Pairs of a node and the hash of a script that the node does not know, for example after a failover or a
        SCRIPT FLUSH."""
        self._end = end
        self._now = now

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - self._now()

    def attempt_timeout(self) -> float:
        """Seconds for the next attempt."""
        return _attempt_timeout(max(0.001, self.left()))

    def give_up(self, item: _Item, reason: str, error: AgentPerfError | None = None) -> None:
        """Settle an item with an error that states whether the command may have been applied."""
        known = error if error is not None else unavailable(self.topology.address.masked, item.maybe_applied, reason)
        self.settle(item.index, known)


def unavailable(address: str, maybe_applied: bool, reason: str) -> BackendUnavailable:
    """Return the error for a request without a reply. It states whether the request may have been applied."""
    outcome: RequestOutcome = "unknown" if maybe_applied else "not_applied"
    return BackendUnavailable(address, outcome, reason)


def _round(items: list[_Item], context: _Context) -> Generator[DeliveryStep, Any, tuple[list[_Item], bool]]:
    """Send each item once. Return the items to retry, and whether to back off before the retry."""
    waiting: list[_Item] = []
    backoff = False
    if context.topology.doubtful:
        trouble = yield from _request_layout(context)
        if trouble is not None:
            if trouble.final:
                for item in items:
                    context.give_up(item, trouble.reason, trouble.error)
                return [], False
            backoff = True
            for item in items:
                item.reason = item.reason or trouble.reason
    for node, group in _grouped(items, context, waiting).items():
        for start, stop in _split_pipeline(group):
            broken = yield from _send(node, group[start:stop], context, waiting)
            backoff |= broken is not None and not broken.stale
            if broken is not None:
                waiting += group[stop:]  # the node has failed: send it no more items in this round
                break
    return waiting, backoff or any(not item.at_once for item in waiting)


def _request_layout(context: _Context) -> Generator[DeliveryStep, Any, ExchangeFailed | None]:
    """Request the layout from a node. If the node refuses permanently, ask the next one. Return the failure, if any."""
    refused: ExchangeFailed | None = None
    for _ in range(context.topology.sources):
        source, layout_request = context.topology.layout_request()
        try:
            (answer,) = yield Exchange(source, layout_request, 1, context.attempt_timeout() / 2)
        except ExchangeFailed as failed:
            refused = failed if failed.final or refused is None else refused
            if not failed.final:
                return failed
            continue
        trouble = context.topology.learn(source, answer)
        return ExchangeFailed(trouble, sent=False) if trouble else None
    return refused


def _grouped(items: list[_Item], context: _Context, waiting: list[_Item]) -> dict[Node, list[_Item]]:
    """Group items by node. Add to `waiting` the items without a node and the redirected items of a busy node.

    A node is busy if it already has other items in this round.
    """
    groups: dict[Node, list[_Item]] = {}
    redirected = [item for item in items if item.node is not None]
    for item in items:
        if item.node is None:
            keys = item.command.keys
            node = context.topology.node_for(keys[0] if keys else None)
            if node is not None:
                groups.setdefault(node, []).append(item)
                continue
            item.reason = item.reason or "no node of the Cluster serves the key's slot"
            item.at_once = False
            context.topology.doubt()
            waiting.append(item)
    asking: dict[Node, list[_Item]] = {}
    for item in redirected:
        if item.node in groups:  # wait for the next round: redirected items never share a pipeline with other items
            waiting.append(item)
        elif item.node is not None:
            asking.setdefault(item.node, []).append(item)
    return groups | asking


def _split_pipeline(group: list[_Item]) -> Iterator[tuple[int, int]]:
    """Split a long pipeline, so that client and server buffer a bounded number of bytes."""
    if len(group) == 1:  # the common case: a single command cannot be split
        yield 0, 1
        return
    start = size = 0
    for at, item in enumerate(group):
        size += sum(len(arg) for arg in item.command.wire_args() if isinstance(arg, (str, bytes)))
        if at > start and (at - start >= PIPELINE_COMMANDS or size > PIPELINE_BYTES):
            yield start, at
            start, size = at, 0
    yield start, len(group)


def _send(
    node: Node, items: list[_Item], context: _Context, waiting: list[_Item]
) -> Generator[DeliveryStep, Any, ExchangeFailed | None]:
    """Send one pipeline and settle the answered items. Return the failure that interrupted the pipeline, if any."""
    asking = items[0].node is not None
    broken = None
    if context.lacking:
        _add_sources(node, items, context)
    try:
        replies = yield Exchange(
            node,
            _payload(items, asking=asking, scattered=context.topology.scattered),
            len(items) * (1 + asking),
            context.attempt_timeout(),
        )
    except ExchangeFailed as failed:
        broken, replies = failed, failed.replies
    if asking:
        replies = replies[1::2]
    yield from _take(node, items, replies, broken, context, waiting)
    return broken


def _add_sources(node: Node, items: list[_Item], context: _Context) -> None:
    """Add the source to the first command of each script, if the node lacks the script.

    The later commands find the script loaded. If every command carried the source, 500 puts would be 28 MB long. A
    command that was refused before may be refused again, because its slot is being moved, and then loads no script. So
    a refused command carries the source only if the script has no other command in this pipeline.
    """
    loading: set[str] = set()
    for item in sorted(items, key=lambda item: bool(item.reason)):
        script = item.command.script
        if isinstance(script, Script) and (node, script.sha) in context.lacking and script.sha not in loading:
            item.by_source = True
            loading.add(script.sha)


def _take(
    node: Node,
    items: list[_Item],
    replies: Sequence[Reply],
    broken: ExchangeFailed | None,
    context: _Context,
    waiting: list[_Item],
) -> Generator[DeliveryStep, Any, None]:
    """Settle the items that have a final result. Add the others to `waiting`."""
    if broken is not None:
        # Items with a reply are not sent again. So a long pipeline makes progress even if the network fails often.
        items, unanswered = items[: len(replies)], items[len(replies) :]
        for item in unanswered:
            item.maybe_applied |= broken.sent
            item.at_once = broken.stale
            item.unresponsive = None if broken.local else node
            if not (broken.timed_out and item.reason):  # an earlier reason explains more than a timeout
                item.reason = broken.reason
            item.node = None
            if broken.final:
                context.give_up(item, broken.reason, broken.error)
        if not broken.final:
            waiting += unanswered
        if not broken.local:
            context.topology.doubt()
    loaded: set[str] = set()
    for item, reply in zip(items, replies, strict=True):
        item.node = None
        if not isinstance(reply, ServerError):
            if item.by_source and isinstance(item.command.script, Script):
                loaded.add(item.command.script.sha)
                context.lacking.discard((node, item.command.script.sha))
            context.settle(item.index, _decoded(item.command, reply))
        elif reply.text.startswith("NOSCRIPT"):
            _note_unknown_script(item, node, loaded, context)
            waiting.append(item)
        elif reply.text.startswith("WRONGTYPE"):
            context.settle(item.index, (yield from _wrong_type(item.command, node, max(0.05, context.left()))))
        else:
            error = _read_error(item, reply.text, node, context.topology)
            if error is None:
                item.unresponsive = node  # if errors persist until the deadline, a probe checks the node
                waiting.append(item)
            else:
                context.settle(item.index, error)


def _note_unknown_script(item: _Item, node: Node, loaded: set[str], context: _Context) -> None:
    """Retry a command at once. The command did not run, because the node does not know its script.

    Args:
        item: the command.
        node: the node that replied.
        loaded: hashes of the scripts that earlier commands of the same pipeline have loaded.
        context: the delivery.
    """
    item.at_once = True
    item.unresponsive = None
    script = item.command.script
    if not isinstance(script, Script):
        return
    if script.sha in loaded:  # the script was loaded on another server: a proxy may split a pipeline among servers
        item.by_source = True
    else:
        context.lacking.add((node, script.sha))


def _payload(items: list[_Item], *, asking: bool, scattered: bool) -> bytes:
    prefix = pack(("ASKING",)) if asking else b""
    return b"".join(
        prefix + pack_call(item.command, by_source=item.by_source, again=item.maybe_applied, scattered=scattered)
        for item in items
    )


def _decoded(command: Command[Any], reply: Reply) -> Any:
    try:
        return command.decode(reply)
    except AgentPerfError as error:
        return error


def refusal_reason(text: str) -> str | None:
    """Return what an error reply means if the error is known to be permanent, otherwise None."""
    return next((meaning for beginning, meaning in _REFUSED.items() if text.startswith(beginning)), None)


def transient_reason(text: str) -> str | None:
    """Return the meaning of a transient error reply, or None if the error is not transient."""
    return next((meaning for beginning, meaning in _TRANSIENT.items() if text.startswith(beginning)), None)


def _read_error(item: _Item, text: str, node: Node, topology: Topology) -> AgentPerfError | None:
    """Return the error for the caller of a command, or None to retry the command."""
    address = topology.address.masked
    code, _, detail = text.partition(" ")
    item.at_once = False
    if code in ("MOVED", "ASK"):
        if topology.fixed:
            scheme = "rediss+cluster" if topology.address.tls else "redis+cluster"
            return unavailable(
                address, item.maybe_applied, f"it is a node of a Cluster: the URL must begin with {scheme}://"
            )
        if code == "MOVED":
            topology.doubt()
            item.reason = "the Cluster is being rearranged"
        elif needs_whole_slot(item.command):
            item.reason = _SLOT_MOVES
        else:
            item.at_once = True
            item.node = topology.redirected(detail.rpartition(" ")[2], node)
        return None
    meaning = transient_reason(text)
    if meaning is None:
        meaning = next((f"{known} ({text})" for part, known in _TRANSIENT_IN_SCRIPT.items() if part in text), None)
        item.maybe_applied |= meaning is not None
    if meaning is not None:
        item.reason = meaning
        if code in ("READONLY", "MASTERDOWN", "CLUSTERDOWN"):
            topology.doubt()
        return None
    if code == "OOM":
        if item.maybe_applied:
            return unavailable(address, True, "its first reply was lost, and now it is at its maxmemory")
        return BackendFull(address)
    if code == "CORRUPT":
        key, _, found = detail.partition(" ")
        return CorruptState(key, found or "something unexpected")
    refusal = refusal_reason(text)
    if refusal is not None:
        # The server may refuse a command in the middle of a script, after the script has written something.
        return unavailable(address, item.maybe_applied or "script" in text, f"{refusal} ({text})")
    script = item.command.script
    return ScriptFailed(script.name if isinstance(script, Script) else script, text)


def _wrong_type(command: Command[Any], node: Node, left_s: float) -> Generator[DeliveryStep, Any, AgentPerfError]:
    """Find the key that has the wrong type, because the server's error does not name the key."""
    expected = _expected_types(command)
    if expected:
        try:
            replies = yield Exchange(node, b"".join(pack(("TYPE", key)) for key, _ in expected), len(expected), left_s)
        except ExchangeFailed:
            replies = []
        for (key, wanted), reply in zip(expected, replies, strict=False):
            found = reply.decode() if isinstance(reply, bytes) else "none"
            if found not in ("none", wanted):
                return CorruptState(key, f"a {found} where a {wanted} belongs")
    return CorruptState(command.keys[0], "a value of the wrong type, or another key of the command does")


def _expected_types(command: Command[Any]) -> list[tuple[str, str]]:
    if not isinstance(command.script, Script):
        plain = {"MGET": "string", "GET": "string", "HGETALL": "hash", "HMGET": "hash", "HGET": "hash"}
        wanted = plain.get(command.script, "zset" if command.script.startswith("Z") else "")
        return [(key, wanted) for key in command.keys] if wanted else []
    slots = command.script.header.keys
    types = [slot.type.lower() for slot in slots]
    if slots and slots[-1].many:
        types += [types[-1]] * (len(command.keys) - len(types))
    return [pair for pair in zip(command.keys, types, strict=False) if pair[1] in ("string", "hash", "zset", "list")]
