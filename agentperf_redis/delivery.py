"""How commands get to the server and their replies back, whatever goes wrong on the way: decided here, done elsewhere.

`deliver` is a generator without I/O. It yields what a driver has to do (`Exchange` bytes with a node, `Rest` a while)
and is sent the replies, so that the blocking and the asyncio driver share one retry loop, one way through a Cluster,
one reading of errors. redis-py's own retries are off: they repeat a request up to 11 times without a word, and in a
Cluster without a pause.

Repeating is safe because no mutating script of this library harms when it is delivered twice, late, or after its caller
gave up; each says in its header how.
"""

from __future__ import annotations

import random
import time
from binascii import crc_hqx
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import hiredis

from agentperf_redis.address import Address, Kind
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import (
    AgentPerfError,
    BackendFull,
    BackendUnavailable,
    CorruptState,
    Outcome,
    ScriptFailed,
)
from agentperf_redis.script import Script

SLOTS = 16384
PIPELINE_COMMANDS = 512
"""Commands sent in one go; more are cut up, so that neither side buffers without bound."""

_FIRST_REST_S, _LONGEST_REST_S = 0.004, 0.25
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
    "ERR AUTH": "it asks for no password, but the URL has one",
    "ERR invalid password": "the password is wrong",
    "ERR DB index": "it has no such database",
    "ERR SELECT": "it has no such database",
}
"""Beginnings of error replies that no repetition will change."""


class Node(NamedTuple):
    """One server process to talk to. Unix sockets and the embedded server have their path as host and port 0."""

    host: str
    port: int
    sentinel: bool = False


class ServerError:
    """An error reply, as a value: the server's text whole, its code the first word."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class ExchangeFailed(Exception):
    """Raised by drivers: a node could not be reached, or did not answer in time.

    Attributes:
        sent: whether anything may have reached the server.
        reason: in words.
        final: whether repeating is pointless (the handshake was refused).
        stale: whether the connection had been idle, so that a new one may do at once.
        silent: whether all that is known is that no answer came in time.
        replies: those that had arrived before.
    """

    def __init__(
        self,
        reason: str,
        *,
        sent: bool,
        final: bool = False,
        stale: bool = False,
        silent: bool = False,
        replies: Sequence[Reply] = (),
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent
        self.final = final
        self.stale = stale
        self.silent = silent
        self.replies = replies


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send `payload` to `node` and return its `count` replies, all within `timeout_s` seconds."""

    node: Node
    payload: bytes
    count: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Rest:
    """Do nothing for `seconds`."""

    seconds: float


DeliveryStep: TypeAlias = Exchange | Rest
Delivery: TypeAlias = Generator[DeliveryStep, Any, list[Any]]


def key_slot(key: str) -> int:
    """Return the Cluster slot of a key: CRC16 (XMODEM) of its hash tag, modulo 16384 (Redis Cluster specification)."""
    data = key.encode()
    start = data.find(b"{")
    if start >= 0:
        end = data.find(b"}", start + 1)
        if end > start + 1:
            data = data[start + 1 : end]
    return crc_hqx(data, 0) % SLOTS


class Topology:
    """Which node serves which key. Shared by all drivers of a backend; replaced whole, so it needs no lock."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.tried = 0
        """Which of the address's nodes is asked next for the layout."""
        self._seeds = tuple(Node(host, port, address.kind is Kind.SENTINEL) for host, port in address.nodes)
        self._slots: dict[int, Node] = {}
        self._primary: Node | None = None
        if address.kind in (Kind.UNIX, Kind.EMBEDDED):
            self._primary = Node(address.path, 0)
        elif address.kind is Kind.STANDALONE:
            self._primary = self._seeds[0]

    @property
    def fixed(self) -> bool:
        """Whether there is one server and nothing to find out."""
        return self.address.kind in (Kind.STANDALONE, Kind.UNIX, Kind.EMBEDDED)

    def node_for(self, key: str | None) -> Node | None:
        """Return the node of a key, any node for None, or None while that is unknown."""
        if self.address.kind is not Kind.CLUSTER:
            return self._primary
        if key is None:
            return next(iter(self._slots.values()), None)
        return self._slots.get(key_slot(key))

    def forget(self) -> None:
        """The layout is out of date: find it out again before the next command."""
        if not self.fixed:
            self._primary = None
            self._slots = {}

    def question(self) -> tuple[Node, bytes]:
        """Return whom to ask for the layout, and what; another seed each time."""
        known = (*self._seeds, *dict.fromkeys(self._slots.values()))
        node = known[self.tried % len(known)]
        self.tried += 1
        if self.address.kind is Kind.SENTINEL:
            return node, pack(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.service))
        return node, pack(("CLUSTER", "SLOTS"))

    def learn(self, asked: Node, reply: Reply) -> str:
        """Take in the answer to `question`.

        Returns:
            An empty text, or what is wrong with the answer.
        """
        if isinstance(reply, ServerError):
            return reply.text
        try:
            if self.address.kind is Kind.SENTINEL:
                if reply is None:
                    return f"Sentinel knows no primary named {self.address.service!r}"
                self._primary = Node(reply[0].decode(), int(reply[1]))
                return ""
            slots: dict[int, Node] = {}
            for start, end, primary, *_ in reply:
                # a node that does not know its own address yet leaves it out: it is the one asked
                node = Node(primary[0].decode() if primary[0] else asked.host, int(primary[1]))
                slots.update(dict.fromkeys(range(start, end + 1), node))
        except (AttributeError, IndexError, TypeError, ValueError):
            return f"{asked.host}:{asked.port} described no layout"
        if not slots:
            return "the Cluster serves no slots"
        self._slots = slots
        return ""


def pack(parts: Sequence[str | bytes | int]) -> bytes:
    """Return one command in the server's wire form."""
    packed: bytes = hiredis.pack_command(tuple(parts))  # type: ignore[arg-type]  # its stub says a 1-tuple
    return packed


def pack_call(command: Command[Any], *, by_source: bool, again: bool) -> bytes:
    """Return a Command in wire form.

    Args:
        command: what to send.
        by_source: send the whole script instead of its hash.
        again: it was sent before.
    """
    args = command.resend_args if again and command.resend_args is not None else command.args
    script = command.script
    if isinstance(script, Script):
        how = ("EVAL", script.source) if by_source else ("EVALSHA", script.sha)
        return pack((*how, len(command.keys), *command.keys, *args))
    return pack((script, *command.keys, *args))


class _Item:
    """One command under way."""

    __slots__ = ("at_once", "by_source", "command", "index", "maybe_applied", "node", "reason")

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


def deliver(
    commands: Sequence[Command[Any]],
    topology: Topology,
    deadline_s: float,
    now: Callable[[], float] = time.monotonic,
) -> Delivery:
    """Deliver commands and decode their replies.

    Args:
        commands: what to run. Not atomic: each stands for itself.
        topology: where to send them.
        deadline_s: seconds for all of it.
        now: the clock.

    Returns:
        For each command what its decoder made of the reply, or the AgentPerfError it met.
    """
    address = topology.address.masked
    results: list[Any] = [None] * len(commands)
    waiting = [_Item(index, command) for index, command in enumerate(commands)]
    end = now() + deadline_s
    rests = 0
    reason = "there was no time to ask"
    while waiting:
        left = end - now()
        if left <= 0:
            for item in waiting:
                outcome: Outcome = "unknown" if item.maybe_applied else "not_applied"
                why = f"{item.reason or reason}; gave up after {deadline_s:g} s"
                results[item.index] = BackendUnavailable(address, outcome, why)
            break
        patience = left / 2 if left > _SPLIT_ABOVE_S else left
        groups, lost = _grouped(waiting, topology)
        if lost:
            asked, question = topology.question()
            try:
                (answer,) = yield Exchange(asked, question, 1, patience)
                trouble = topology.learn(asked, answer)
            except ExchangeFailed as failed:
                if failed.final:
                    _give_up(waiting, results, address, failed)
                    break
                trouble = failed.reason
            if not trouble:
                continue
            reason = trouble
            rest = True
        else:
            waiting, rest = [], False
            for node, group in groups.items():
                for start in range(0, len(group), PIPELINE_COMMANDS):
                    items = group[start : start + PIPELINE_COMMANDS]
                    asking = items[0].node is not None
                    payload = _payload(items, asking=asking)
                    broken = None
                    try:
                        replies = yield Exchange(node, payload, len(items) * (2 if asking else 1), patience)
                    except ExchangeFailed as failed:
                        broken, replies = failed, failed.replies
                    if asking:
                        replies = replies[1::2]
                    if broken is not None:
                        # What was answered is done: through a network that breaks often, a long pipeline gets on.
                        items, unanswered = items[: len(replies)], items[len(replies) :]
                        for item in unanswered:
                            item.maybe_applied |= broken.sent
                            if not (broken.silent and item.reason):  # the last attempt is often cut short
                                item.reason = broken.reason
                            item.node = None
                        topology.forget()
                        if broken.final:
                            _give_up(unanswered, results, address, broken)
                        else:
                            waiting += unanswered
                            rest |= not broken.stale
                    for item, reply in zip(items, replies, strict=True):
                        item.node = None
                        if not isinstance(reply, ServerError):
                            results[item.index] = _decoded(item.command, reply)
                        elif reply.text.startswith("WRONGTYPE"):
                            results[item.index] = yield from _wrong_type(item.command, node, max(0.05, end - now()))
                        else:
                            error = _read_error(item, reply.text, topology, address)
                            if error is None:
                                waiting.append(item)
                                rest |= not item.at_once
                            else:
                                results[item.index] = error
        if rest and waiting:
            # full jitter (Brooker, "Exponential backoff and jitter"): many clients do not come back in step
            pause = random.uniform(0, min(_LONGEST_REST_S, _FIRST_REST_S * 2**rests))
            rests = min(rests + 1, 16)
            yield Rest(min(pause, max(0.0, end - now())))
    return results


def _grouped(items: list[_Item], topology: Topology) -> tuple[dict[Node, list[_Item]], bool]:
    """Group by node; the second value says that the node of some item is unknown."""
    groups: dict[Node, list[_Item]] = {}
    asking: dict[Node, list[_Item]] = {}
    for item in items:
        if item.node is not None:
            asking.setdefault(item.node, []).append(item)
            continue
        keys = item.command.keys
        node = topology.node_for(keys[0] if keys else None)
        if node is None:
            return {}, True
        groups.setdefault(node, []).append(item)
    for node, redirected in asking.items():
        if node in groups:
            # never in one pipeline with others of that node; they go in the next round
            for item in redirected:
                item.node = None
            groups[node] += redirected
        else:
            groups[node] = redirected
    return groups, False


def _payload(items: list[_Item], *, asking: bool) -> bytes:
    if len(items) == 1 and not asking:
        item = items[0]
        return pack_call(item.command, by_source=item.by_source, again=item.maybe_applied)
    prefix = pack(("ASKING",)) if asking else b""
    return b"".join(
        prefix + pack_call(item.command, by_source=item.by_source, again=item.maybe_applied) for item in items
    )


def _give_up(items: Sequence[_Item], results: list[Any], address: str, failed: ExchangeFailed) -> None:
    for item in items:
        outcome: Outcome = "unknown" if item.maybe_applied else "not_applied"
        results[item.index] = BackendUnavailable(address, outcome, failed.reason)


def _decoded(command: Command[Any], reply: Reply) -> Any:
    try:
        return command.decode(reply)
    except AgentPerfError as error:
        return error


def _read_error(item: _Item, text: str, topology: Topology, address: str) -> AgentPerfError | None:
    """Return what an error reply means to the caller, or None to send the command again."""
    code, _, rest = text.partition(" ")
    item.at_once = code in ("NOSCRIPT", "ASK")
    if code == "NOSCRIPT":
        item.by_source = True
        return None
    if code in ("MOVED", "ASK"):
        if code == "MOVED":
            topology.forget()
            item.reason = "the Cluster is being rearranged"
        else:
            host, _, port = rest.rpartition(" ")[2].rpartition(":")
            item.node = Node(host, int(port))
        return None
    for beginning, meaning in _PASSING.items():
        if text.startswith(beginning):
            item.reason = meaning
            if code in ("READONLY", "MASTERDOWN", "CLUSTERDOWN"):
                topology.forget()
            return None
    if code == "OOM":
        return BackendFull(address)
    if code == "CORRUPT":
        key, _, found = rest.partition(" ")
        return CorruptState(key, found or "something unexpected")
    for beginning, meaning in _REFUSED.items():
        if text.startswith(beginning):
            return BackendUnavailable(address, "not_applied", f"{meaning} ({text})")
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
