"""Maps keys to nodes: to the one server, to the primary that Sentinel names, or to the nodes of a Cluster by slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from agentperf_redis.command import Reply
from agentperf_redis.keys import key_slot
from agentperf_redis.transport.address import Address, ServerKind
from agentperf_redis.transport.resp import ServerError, pack

_UNKNOWN_HOST = "?"
"""A node announces this host name if it is configured to announce a host name but has none."""


class Node(NamedTuple):
    """The address of a server process: host and port; for a Unix socket or the embedded server, a path and port 0."""

    host: str
    port: int
    sentinel: bool = False


class Topology:
    """The known map of keys to nodes, called the layout. All drivers of a backend share it.

    Attributes:
        address: the address given by the user.
        doubtful: whether the layout may be out of date and should be refreshed. Until the refresh, the old layout stays
            in use. A refresh replaces the whole layout.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._seeds = tuple(Node(host, port, address.kind is ServerKind.SENTINEL) for host, port in address.nodes)
        self._requests = 0
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
        """Whether there is only one server, so that the layout never changes."""
        return self.address.kind in (ServerKind.STANDALONE, ServerKind.UNIX, ServerKind.EMBEDDED)

    @property
    def scattered(self) -> bool:
        """Whether the keys are spread over several nodes."""
        return self.address.kind is ServerKind.CLUSTER

    @property
    def sources(self) -> int:
        """The number of nodes that can report the layout."""
        return len(self._sources())

    def node_for(self, key: str | None) -> Node | None:
        """Return the node of a key; any node if the key is None. Return None if no such node is known."""
        if not self.scattered:
            return self._primary
        if key is None:
            return next(iter(self._slots.values()), None)
        return self._slots.get(key_slot(key))

    def parts(self, keys: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """Group commands by the node that holds their keys. Returns no groups if one of these nodes is unknown.

        Args:
            keys: the keys of each command.

        Returns:
            For each node, the positions of its commands.
        """
        if self.doubtful:
            return []
        groups: dict[Node, list[int]] = {}
        for index, its in enumerate(keys):
            node = self.node_for(its[0] if its else None)
            if node is None:
                return []
            groups.setdefault(node, []).append(index)
        return list(groups.values())

    def located(self, node: Node | None, reason: str) -> str:
        """Return the reason of a failure. On a Cluster, add the failed node, since the address names several nodes."""
        name = "" if node is None or not self.scattered else f"{node.host}:{node.port}"
        return reason if name in reason else f"node {name}: {reason}"

    def uses(self, node: Node) -> bool:
        """Whether commands may be sent to this node under the current layout."""
        return node in self._slots.values() if self.scattered else node == self._primary

    @property
    def primaries(self) -> tuple[Node, ...]:
        """The known nodes that serve keys, in the order of their slots."""
        if self.scattered:
            return tuple(dict.fromkeys(self._slots.values()))
        return () if self._primary is None else (self._primary,)

    def redirected(self, address: str, source: Node) -> Node:
        """Return the node that a redirect names.

        Args:
            address: host and port in the redirect.
            source: the node that sent the redirect.
        """
        host, _, port = address.rpartition(":")
        if host == _UNKNOWN_HOST:
            known = [node for node in self.primaries if node.port == int(port)]
            if len(known) == 1:
                return known[0]
        return Node(source.host if host in ("", _UNKNOWN_HOST) else host, int(port))

    def doubt(self) -> None:
        """Mark the layout as possibly out of date."""
        self.doubtful = not self.fixed

    def layout_request(self) -> tuple[Node, bytes]:
        """Return a node, and the request for its view of the layout. Successive calls return different nodes."""
        known = self._sources()
        node = known[self._requests % len(known)]
        self._requests += 1
        if self.address.kind is ServerKind.SENTINEL:
            return node, pack(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.service))
        return node, pack(("CLUSTER", "SLOTS"))

    def _sources(self) -> tuple[Node, ...]:
        """The nodes in the URL and those of the layout. Nodes in the URL may no longer exist."""
        return tuple(dict.fromkeys((*self._seeds, *self._slots.values())))

    def learn(self, source: Node, reply: Reply) -> str:
        """Apply the reply to `layout_request`.

        Returns:
            An empty text, or a description of the fault in the reply.
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
            for start, end, primary, *_ in sorted(reply, key=lambda entry: int(entry[0])):
                slots.update(dict.fromkeys(range(start, end + 1), _announced(primary, source)))
        except (AttributeError, IndexError, TypeError, ValueError):
            return f"{source.host}:{source.port} did not return a layout"
        if not slots:
            return "the Cluster serves no slots"
        self._slots = slots
        self.doubtful = False
        return ""


def _announced(primary: Any, source: Node) -> Node:
    """Return the node that a list in the reply to CLUSTER SLOTS describes.

    The list has the host, the port and the id of the node. It may also have a list of other addresses, in which a name
    such as ``ip`` precedes each address.

    The host is null or empty if clients must use the address at which they reached the node that replied (documented
    for the command CLUSTER SLOTS). The host is ``?`` if the host name is unknown. In this case, the other addresses
    contain the IP address.
    """
    host = primary[0].decode() if primary[0] else ""
    if host == _UNKNOWN_HOST:
        others = primary[3] if primary[3:] else []
        host = dict(zip(others[::2], others[1::2], strict=False)).get(b"ip", b"").decode()
    return Node(host or source.host, int(primary[1]))
