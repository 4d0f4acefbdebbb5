"""Moves slots of a Cluster from node to node: key by key, as `redis-cli --cluster reshard` does, or atomically."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import redis

from agentperf_redis.keys import SLOTS, key_slot
from tests.support.servers import Node, Server, migrate_login, wait_until

_TIMEOUT_MS = 5000
_ATOMIC_TIMEOUT_S = 120.0
_SLOTS_AT_ONCE = 1024


class SlotMover:
    """Moves slots between the nodes of a Cluster. Only one mover may move the slots of a Cluster.

    Attributes:
        server: the Cluster.
        nodes: its nodes.
        owners: the node of each slot.
        max_disagreement: the longest time, in s, for which both the old and the new node of a slot considered
            themselves its owner. During this time, the old node does not forward messages published at the new node.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.nodes = server.nodes
        self._clients = {node: node.client() for node in self.nodes}
        for node in self.nodes:  # a node without slots must not become a replica
            self._call(node, "CONFIG", "SET", "cluster-allow-replica-migration", "no")
        self._ids = {node: self._call(node, "CLUSTER", "MYID") for node in self.nodes}
        share = -(-SLOTS // len(self.nodes))
        self.owners = {slot: self.nodes[slot // share] for slot in range(SLOTS)}
        self.max_disagreement = 0.0
        self._open: dict[int, Node] = {}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def _call(self, node: Node, *words: str | int) -> Any:
        return self._clients[node].execute_command(*words)

    def next_after(self, node: Node) -> Node:
        return self.nodes[(self.nodes.index(node) + 1) % len(self.nodes)]

    def keys(self, slot: int) -> list[str]:
        """Return the keys of a slot that are still on its owner."""
        found: list[str] = self._call(self.owners[slot], "CLUSTER", "GETKEYSINSLOT", slot, 10_000)
        return sorted(found)

    def used_slots(self) -> list[int]:
        """Return the slots that hold keys."""
        return sorted({key_slot(key) for node in self.nodes for key in self._call(node, "KEYS", "*")})

    def assert_keys_are_on_one_node(self) -> None:
        """Check that each key is only on the owner of its slot."""
        for node in self.nodes:
            strays = [key for key in self._call(node, "KEYS", "*") if self.owners[key_slot(key)] is not node]
            assert strays == []

    def open(self, slot: int, target: Node) -> None:
        """Begin to move a slot. No key has been moved yet."""
        source, self._open[slot] = self.owners[slot], target
        self._call(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self._ids[source])
        self._call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self._ids[target])

    def migrate(self, slot: int, target: Node, *names: str) -> None:
        """Move some keys of an open slot."""
        for name in names:
            self._call(self.owners[slot], "MIGRATE", "127.0.0.1", target.port, name, 0, _TIMEOUT_MS, *migrate_login())

    def settle(self, slot: int, target: Node) -> None:
        """End the move of a slot, after all its keys have been moved."""
        source = self.owners[slot]
        begun = time.monotonic()
        self._call(target, "CLUSTER", "SETSLOT", slot, "NODE", self._ids[target])
        self._call(source, "CLUSTER", "SETSLOT", slot, "NODE", self._ids[target])
        self.max_disagreement = max(self.max_disagreement, time.monotonic() - begun)
        for node in self.nodes:
            if node not in (source, target):
                self._call(node, "CLUSTER", "SETSLOT", slot, "NODE", self._ids[target])
        self.owners[slot] = target
        del self._open[slot]

    def finish_all(self) -> None:
        """End the moves that a failed test has left unfinished."""
        for slot, target in list(self._open.items()):
            self.finish(slot, target)

    def finish(self, slot: int, target: Node, pause_s: float = 0.0) -> None:
        """Move the remaining keys of an open slot one by one, and end the move.

        Args:
            slot: the slot.
            target: its next owner.
            pause_s: pause after each key.
        """
        while names := self.keys(slot):
            for name in names:
                self.migrate(slot, target, name)
                time.sleep(pause_s)
        self.settle(slot, target)

    def move(self, slot: int, target: Node, pause_s: float = 0.0) -> None:
        """Move a slot key by key, from beginning to end."""
        self.open(slot, target)
        self.finish(slot, target, pause_s)

    def move_empty(self, slots: Iterable[int]) -> None:
        """Move each of these empty slots to the node after its owner."""
        by_owner: dict[Node, list[int]] = {}
        for slot in slots:
            by_owner.setdefault(self.owners[slot], []).append(slot)
        for source, all_slots in by_owner.items():
            target = self.next_after(source)
            for at in range(0, len(all_slots), _SLOTS_AT_ONCE):
                some = all_slots[at : at + _SLOTS_AT_ONCE]
                self._each(target, some, "IMPORTING", source)
                self._each(source, some, "MIGRATING", target)
                for node in (target, source, self.next_after(target)):
                    self._each(node, some, "NODE", target)
                self.owners.update(dict.fromkeys(some, target))

    def _each(self, node: Node, slots: list[int], state: str, other: Node) -> None:
        with self._clients[node].pipeline(transaction=False) as pipeline:
            for slot in slots:
                pipeline.execute_command("CLUSTER", "SETSLOT", slot, state, self._ids[other])
            pipeline.execute()

    @property
    def moves_atomically(self) -> bool:
        """Whether the server has CLUSTER MIGRATESLOTS (Valkey 9.0)."""
        return "MIGRATESLOTS" in str(self._call(self.nodes[0], "CLUSTER", "HELP"))

    def move_all_atomically(self) -> None:
        """Move every slot to the node after its owner."""
        before = dict(self.owners)
        for source in self.nodes:
            target = self.next_after(source)
            ranges = _ranges(slot for slot, owner in before.items() if owner is source)
            words = [word for first, last in ranges for word in ("SLOTSRANGE", first, last)]
            words += ["NODE", self._ids[target]]
            self.owners.update({slot: target for slot, owner in before.items() if owner is source})
            wait_until(partial(self._migrated, source, words), "the atomic migration", _ATOMIC_TIMEOUT_S)

    def _migrated(self, source: Node, words: list[Any]) -> bool:
        """Return whether every node knows the new owners of all slots. If no migration runs, begin one.

        On a busy machine, a migration may fail and has to begin again.

        The server refuses a migration until it knows the new owner of every other slot.
        """
        if self._agreed():
            return True
        jobs = self._call(source, "CLUSTER", "GETSLOTMIGRATIONS")
        if all(str(job["state"]) in ("success", "failed", "cancelled") for job in map(_as_dict, jobs)):
            with contextlib.suppress(redis.ResponseError):
                self._call(source, "CLUSTER", "MIGRATESLOTS", *words)
        return False

    def _agreed(self) -> bool:
        """Return whether every node knows the owner of every slot."""
        ports = [self.owners[slot].port for slot in range(SLOTS)]
        for node in self.nodes:
            known = [0] * SLOTS
            for first, last, primary, *_ in self._call(node, "CLUSTER", "SLOTS"):
                known[first : last + 1] = [int(primary[1])] * (last + 1 - first)
            if known != ports:
                return False
        return True


def _as_dict(reply: Any) -> dict[str, Any]:
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _ranges(slots: Iterable[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if found and found[-1][1] == slot - 1:
            found[-1] = (found[-1][0], slot)
        else:
            found.append((slot, slot))
    return found
