"""How commands get to the server and their replies back, whatever goes wrong on the way: decided here, done elsewhere.

`deliver` is a generator without I/O. It yields what a driver has to do (`Exchange` bytes with a node, `Backoff` for
some time) and is sent the replies, so that the blocking and the asyncio driver share one retry loop, one way through a
Cluster, one reading of errors. redis-py's own retries are off: they repeat a request up to 11 times without a word, and
in a Cluster without a pause.

Repeating is safe because no mutating script of this library harms when it is delivered twice, late, or after its caller
gave up; each says in its header how.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import (
    AgentPerfError,
    BackendFull,
    BackendUnavailable,
    CorruptState,
    RequestOutcome,
    ScriptFailed,
)
from agentperf_redis.script import Script
from agentperf_redis.transport.breaker import Breaker
from agentperf_redis.transport.resp import ServerError, pack, pack_call
from agentperf_redis.transport.topology import Node, Topology

PIPELINE_COMMANDS = 512
PIPELINE_BYTES = 4 * 1024 * 1024
"""Commands and bytes of arguments sent in one go; more are cut up."""

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.004, 0.25
_SPLIT_ABOVE_S = 0.5
"""With more time than this left, an attempt gets half of it, so that one lost packet does not use up the deadline."""

_PASSING = {
    "BUSY": "it is busy with a slow script",
    "CLUSTERDOWN": "the Cluster is down",
    "ERR max number of clients": "it has reached its maxclients",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "the replica has lost its primary",
    "MISCONF": "it cannot save to disk and refuses writes (look into its log)",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write",
    "READONLY": "it is a read-only replica",
    "TRYAGAIN": "the slot is being moved",
    "UNBLOCKED": "it is failing over",
}
"""Beginnings of error replies that may be gone in a moment: nothing was applied, ask again until the deadline."""

_REFUSED = {
    "DENIED": "it is in protected mode",
    "NOAUTH": "it asks for a password: put it into the URL, redis://:password@host",
    "NOPERM": "the ACL user may not do this",
    "WRONGPASS": "user name or password are wrong",
    "ERR ACL failure in script": "the ACL user may not do all that the script does",
    "ERR The user executing the script": "the ACL user may not do all that the script does",
    "ERR AUTH": "it asks for no password, but the URL has one",
    "ERR invalid password": "the password is wrong",
    "ERR DB index": "it has no such database",
    "ERR SELECT": "it has no such database",
}
"""Beginnings of error replies that no repetition will change."""


class ExchangeFailed(Exception):
    """Raised by drivers: a node could not be reached, or did not answer in time.

    Attributes:
        reason: in words.
        sent: whether anything may have reached the server.
        final: whether repeating is pointless (the handshake was refused).
        stale: whether the connection had been idle, so that a new one may do at once.
        silent: whether all that is known is that no answer came in time.
        local: whether the trouble is this process's own, and says nothing about the node.
        replies: those that had arrived before.
        error: what to tell callers instead of BackendUnavailable.
    """

    def __init__(
        self,
        reason: str,
        *,
        sent: bool,
        final: bool = False,
        stale: bool = False,
        silent: bool = False,
        local: bool = False,
        replies: Sequence[Reply] = (),
        error: AgentPerfError | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent
        self.final = final
        self.stale = stale
        self.silent = silent
        self.local = local
        self.replies = replies
        self.error = error


@dataclass(slots=True)  # not frozen: one is made for each command, and that doubles what it takes
class Exchange:
    """Send `payload` to `node` and return its `count` replies, all within `timeout_s` seconds."""

    node: Node
    payload: bytes
    count: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Backoff:
    """Do nothing for `seconds`."""

    seconds: float


DeliveryStep: TypeAlias = Exchange | Backoff
DeliveryFlow: TypeAlias = Generator[DeliveryStep, Any, None]
Settle: TypeAlias = Callable[[int, Any], None]
"""Takes the index of a command and its result, as soon as it is known."""


class _Item:
    """One command under way."""

    __slots__ = ("at_once", "by_source", "command", "index", "maybe_applied", "node", "reason", "silent")

    def __init__(self, index: int, command: Command[Any]) -> None:
        self.index = index
        self.command = command
        self.by_source = False
        """Once a node did not know the script, it is sent whole: after ASK the next node may not know it either."""
        self.at_once = False
        """Whether to send again without a rest."""
        self.maybe_applied = False
        self.node: Node | None = None
        """Set by ASK: where to send it this once."""
        self.reason = ""
        self.silent: Node | None = None
        """The node that had no answer for it, the last time."""


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
        commands: what to run. Not atomic: each stands for itself.
        topology: where to send them.
        deadline_s: seconds for all of it.
        settle: is told for each command what its decoder made of the reply, or the AgentPerfError it met.
        breaker: knows which nodes are not worth asking; None asks all.
        now: the clock.
    """
    end = now() + deadline_s
    waiting: list[_Item] = []
    backoffs = 0
    alone = commands[0] if len(commands) == 1 and not topology.doubtful and not (breaker and breaker.open) else None
    node = topology.node_for(alone.keys[0] if alone.keys else None) if alone is not None else None
    if alone is not None and node is not None:
        # The usual case in a straight line; what comes of it otherwise goes the general way.
        broken, replies = None, ()
        try:
            replies = yield Exchange(
                node, pack_call(alone, by_source=False, again=False), 1, _attempt_timeout(deadline_s)
            )
        except ExchangeFailed as failed:
            broken = failed
        else:
            if not isinstance(replies[0], ServerError):
                settle(0, _decoded(alone, replies[0]))
                return
        post = _Post(topology, end, settle, now)
        yield from _take(node, [_Item(0, alone)], replies, broken, post, waiting)
        if waiting and not waiting[0].at_once:
            yield Backoff(random.uniform(0, min(_FIRST_BACKOFF_S, max(0.0, post.left()))))
    else:
        post = _Post(topology, end, settle, now)
        waiting = [_Item(index, command) for index, command in enumerate(commands)]
        if breaker and breaker.open:
            waiting = [item for item in waiting if not _refused(item, breaker, post)]
    while waiting:
        if post.left() <= 0:
            for item in waiting:
                post.give_up(item, f"{item.reason or 'there was no time to ask'}; gave up after {deadline_s:g} s")
            for node in {item.silent for item in waiting}:
                if breaker is not None and node is not None:
                    breaker.suspect(node, deadline_s)
            return
        waiting, backoff = yield from _round(waiting, post)
        if backoff and waiting:
            # full jitter (Brooker, "Exponential backoff and jitter"): many clients do not come back in step
            pause = random.uniform(0, min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2**backoffs))
            backoffs = min(backoffs + 1, 16)
            yield Backoff(min(pause, max(0.0, post.left())))


def deliver_opened(
    opening: Command[None],
    commands: Sequence[Command[Any]],
    topology: Topology,
    deadline_s: float,
    settle: Settle,
    breaker: Breaker | None,
    opened: Callable[[], None],
) -> DeliveryFlow:
    """Deliver a command before all others; where it meets an error, they meet the same and are not sent.

    Args:
        opening: what comes first, with a deadline of its own.
        commands: as for `deliver`, like what follows.
        topology: as above.
        deadline_s: as above.
        settle: as above.
        breaker: as above.
        opened: called once the opening has succeeded.
    """
    results: list[Any] = [None]
    yield from deliver((opening,), topology, deadline_s, results.__setitem__, breaker)
    if isinstance(results[0], AgentPerfError):
        for index in range(len(commands)):
            settle(index, results[0])
        return
    opened()
    yield from deliver(commands, topology, deadline_s, settle, breaker)


def _refused(item: _Item, breaker: Breaker, post: _Post) -> bool:
    keys = item.command.keys
    refusal = breaker.refusal(post.topology.node_for(keys[0] if keys else None))
    if refusal is not None:
        post.settle(item.index, refusal)
    return refusal is not None


def _attempt_timeout(left_s: float) -> float:
    return left_s / 2 if left_s > _SPLIT_ABOVE_S else left_s


class _Post:
    """What one delivery has at hand."""

    def __init__(self, topology: Topology, end: float, settle: Settle, now: Callable[[], float]) -> None:
        self.topology = topology
        self.settle = settle
        self._end = end
        self._now = now

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - self._now()

    def attempt_timeout(self) -> float:
        """Seconds for the next attempt."""
        return _attempt_timeout(max(0.001, self.left()))

    def give_up(self, item: _Item, reason: str, error: AgentPerfError | None = None) -> None:
        """Settle with what is known."""
        known = error if error is not None else unavailable(self.topology.address.masked, item.maybe_applied, reason)
        self.settle(item.index, known)


def unavailable(address: str, maybe_applied: bool, reason: str) -> BackendUnavailable:
    """Return the error that says what is known of a request without an answer."""
    outcome: RequestOutcome = "unknown" if maybe_applied else "not_applied"
    return BackendUnavailable(address, outcome, reason)


def _round(items: list[_Item], post: _Post) -> Generator[DeliveryStep, Any, tuple[list[_Item], bool]]:
    """Send everything once. Returns what is to be sent again, and whether to rest before."""
    waiting: list[_Item] = []
    backoff = False
    if post.topology.doubtful:
        trouble = yield from _ask_for_layout(post)
        if trouble is not None:
            if trouble.final:
                for item in items:
                    post.give_up(item, trouble.reason, trouble.error)
                return [], False
            backoff = True
            for item in items:
                item.reason = item.reason or trouble.reason
    for node, group in _grouped(items, post, waiting).items():
        for start, stop in _cut(group):
            broken = yield from _send(node, group[start:stop], post, waiting)
            backoff |= broken is not None and not broken.stale
            if broken is not None:
                waiting += group[stop:]  # the node is in trouble: ask it once a round
                break
    return waiting, backoff or any(not item.at_once for item in waiting)


def _ask_for_layout(post: _Post) -> Generator[DeliveryStep, Any, ExchangeFailed | None]:
    """Ask one node after the other, until one knows. A refusal is final only if all refuse."""
    refused: ExchangeFailed | None = None
    for _ in range(post.topology.sources):
        asked, question = post.topology.question()
        try:
            (answer,) = yield Exchange(asked, question, 1, post.attempt_timeout() / 2)
        except ExchangeFailed as failed:
            refused = failed if failed.final or refused is None else refused
            if not failed.final:
                return failed
            continue
        trouble = post.topology.learn(asked, answer)
        return ExchangeFailed(trouble, sent=False) if trouble else None
    return refused


def _grouped(items: list[_Item], post: _Post, waiting: list[_Item]) -> dict[Node, list[_Item]]:
    """Group by node. What has none goes to `waiting`, and so does a redirected one whose node has others to serve."""
    groups: dict[Node, list[_Item]] = {}
    redirected = [item for item in items if item.node is not None]
    for item in items:
        if item.node is None:
            keys = item.command.keys
            node = post.topology.node_for(keys[0] if keys else None)
            if node is not None:
                groups.setdefault(node, []).append(item)
                continue
            item.reason = item.reason or "no node of the Cluster serves the key's slot"
            item.at_once = False
            post.topology.doubt()
            waiting.append(item)
    asking: dict[Node, list[_Item]] = {}
    for item in redirected:
        if item.node in groups:  # never in one pipeline with others of that node
            waiting.append(item)
        elif item.node is not None:
            asking.setdefault(item.node, []).append(item)
    return groups | asking


def _cut(group: list[_Item]) -> Iterator[tuple[int, int]]:
    """Cut a pipeline where it grows too long, so that neither side buffers without bound."""
    if len(group) == 1:  # the usual case, which needs no measuring
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
    node: Node, items: list[_Item], post: _Post, waiting: list[_Item]
) -> Generator[DeliveryStep, Any, ExchangeFailed | None]:
    """Send one pipeline and settle what is answered. Returns what broke it, if anything did."""
    asking = items[0].node is not None
    broken = None
    try:
        replies = yield Exchange(
            node, _payload(items, asking=asking), len(items) * (1 + asking), post.attempt_timeout()
        )
    except ExchangeFailed as failed:
        broken, replies = failed, failed.replies
    if asking:
        replies = replies[1::2]
    yield from _take(node, items, replies, broken, post, waiting)
    return broken


def _take(
    node: Node,
    items: list[_Item],
    replies: Sequence[Reply],
    broken: ExchangeFailed | None,
    post: _Post,
    waiting: list[_Item],
) -> Generator[DeliveryStep, Any, None]:
    """Settle what was answered, give up what cannot be, and put the rest to what waits."""
    if broken is not None:
        # What was answered is done: through a network that breaks often, a long pipeline gets on.
        items, unanswered = items[: len(replies)], items[len(replies) :]
        for item in unanswered:
            item.maybe_applied |= broken.sent
            item.at_once = broken.stale
            item.silent = None if broken.local else node
            if not (broken.silent and item.reason):  # the last attempt is often cut short
                item.reason = broken.reason
            item.node = None
            if broken.final:
                post.give_up(item, broken.reason, broken.error)
        if not broken.final:
            waiting += unanswered
        if not broken.local:
            post.topology.doubt()
    for item, reply in zip(items, replies, strict=True):
        item.node = None
        if not isinstance(reply, ServerError):
            post.settle(item.index, _decoded(item.command, reply))
        elif reply.text.startswith("WRONGTYPE"):
            post.settle(item.index, (yield from _wrong_type(item.command, node, max(0.05, post.left()))))
        else:
            error = _read_error(item, reply.text, node, post.topology)
            if error is None:
                item.silent = node  # an error until the deadline is no answer either; a probe will tell
                waiting.append(item)
            else:
                post.settle(item.index, error)


def _payload(items: list[_Item], *, asking: bool) -> bytes:
    if len(items) == 1 and not asking:
        item = items[0]
        return pack_call(item.command, by_source=item.by_source, again=item.maybe_applied)
    prefix = pack(("ASKING",)) if asking else b""
    return b"".join(
        prefix + pack_call(item.command, by_source=item.by_source, again=item.maybe_applied) for item in items
    )


def _decoded(command: Command[Any], reply: Reply) -> Any:
    try:
        return command.decode(reply)
    except AgentPerfError as error:
        return error


def passing(text: str) -> str | None:
    """Return what an error reply means that may be gone in a moment, or None if it is none of these."""
    return next((meaning for beginning, meaning in _PASSING.items() if text.startswith(beginning)), None)


def _read_error(item: _Item, text: str, node: Node, topology: Topology) -> AgentPerfError | None:
    """Return what an error reply means to the caller, or None to send the command again."""
    address = topology.address.masked
    code, _, detail = text.partition(" ")
    item.at_once = code in ("NOSCRIPT", "ASK")
    if code == "NOSCRIPT":
        item.by_source = True
        return None
    if code in ("MOVED", "ASK"):
        if topology.fixed:
            scheme = "rediss+cluster" if topology.address.tls else "redis+cluster"
            return unavailable(
                address, item.maybe_applied, f"it is a node of a Cluster: the URL begins with {scheme}://"
            )
        if code == "MOVED":
            topology.doubt()
            item.reason = "the Cluster is being rearranged"
        else:
            host, _, port = detail.rpartition(" ")[2].rpartition(":")
            item.node = Node(host or node.host, int(port))  # an empty host is the one that answered
        return None
    meaning = passing(text)
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
    for beginning, refusal in _REFUSED.items():
        if text.startswith(beginning):
            # refused inside a script, it may come after a first write
            return unavailable(address, item.maybe_applied or "script" in text, f"{refusal} ({text})")
    script = item.command.script
    return ScriptFailed(script.name if isinstance(script, Script) else script, text)


def _wrong_type(command: Command[Any], node: Node, left_s: float) -> Generator[DeliveryStep, Any, AgentPerfError]:
    """Find out which key has the wrong type: the server's error does not say."""
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
    return CorruptState(command.keys[0], "a value of another type in one of the keys beside it")


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
