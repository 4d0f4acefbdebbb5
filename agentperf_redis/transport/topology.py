"""Which node serves which key: one server, the primary that Sentinel names, or the slots of a Cluster."""

from __future__ import annotations

from binascii import crc_hqx
from typing import NamedTuple

from agentperf_redis.command import Reply
from agentperf_redis.transport.address import Address, ServerKind
from agentperf_redis.transport.resp import ServerError, pack

SLOTS = 16384


class Node(NamedTuple):
    """One server process to talk to. Unix sockets and the embedded server have their path as host and port 0."""

    host: str
    port: int
    sentinel: bool = False


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
    """Which node serves which key, as far as it is known. Shared by all drivers of a backend; replaced whole.

    Attributes:
        address: what the user gave.
        doubtful: whether it is to be found out (again) before it is relied on. What was known stays in use meanwhile.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._seeds = tuple(Node(host, port, address.kind is ServerKind.SENTINEL) for host, port in address.nodes)
        self._tried = 0
        self._slots: dict[int, Node] = {}
        self._primary: Node | None = None
        self.doubtful = False
        if address.kind in (ServerKind.UNIX, ServerKind.EMBEDDED):
            self._primary = Node(address.path, 0)
        elif address.kind is ServerKind.STANDALONE:
            self._primary = self._seeds[0]
        else:
            self.doubtful = True

    @property
    def fixed(self) -> bool:
        """Whether there is one server and nothing to find out."""
        return self.address.kind in (ServerKind.STANDALONE, ServerKind.UNIX, ServerKind.EMBEDDED)

    @property
    def scattered(self) -> bool:
        """Whether keys lie on several nodes."""
        return self.address.kind is ServerKind.CLUSTER

    @property
    def sources(self) -> int:
        """How many nodes can be asked."""
        return len(self._sources())

    def node_for(self, key: str | None) -> Node | None:
        """Return the node of a key, any node for None, or None where that is unknown."""
        if not self.scattered:
            return self._primary
        if key is None:
            return next(iter(self._slots.values()), None)
        return self._slots.get(key_slot(key))

    def uses(self, node: Node) -> bool:
        """Whether a command may be sent to this node, as far as is known now."""
        return node in self._slots.values() if self.scattered else node == self._primary

    def doubt(self) -> None:
        """It may be out of date."""
        self.doubtful = not self.fixed

    def question(self) -> tuple[Node, bytes]:
        """Return whom to ask, and what; another node each time."""
        known = self._sources()
        node = known[self._tried % len(known)]
        self._tried += 1
        if self.address.kind is ServerKind.SENTINEL:
            return node, pack(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.service))
        return node, pack(("CLUSTER", "SLOTS"))

    def _sources(self) -> tuple[Node, ...]:
        """The nodes given, and those found since: the given ones may be dead by now."""
        return tuple(dict.fromkeys((*self._seeds, *self._slots.values())))

    def learn(self, asked: Node, reply: Reply) -> str:
        """Take in the answer to `question`.

        Returns:
            An empty text, or what is wrong with the answer.
        """
        if isinstance(reply, ServerError):
            return reply.text
        try:
            if self.address.kind is ServerKind.SENTINEL:
                if reply is None:
                    return f"Sentinel knows no primary named {self.address.service!r}"
                self._primary = Node(reply[0].decode(), int(reply[1]))
                self.doubtful = False
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
        self.doubtful = False
        return ""
