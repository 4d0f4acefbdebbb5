"""The bus against real servers: it brings messages, tells of every gap, and gets over whatever happens to its lines."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hiredis
import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.command import Command
from agentperf_redis.transport.pubsub.bus import Bus
from agentperf_redis.transport.pubsub.connection import BusConnection
from agentperf_redis.transport.topology import SLOTS, key_slot
from tests.support.proxy import Proxy
from tests.support.servers import Node, Raw, Server, wait_until
from tests.support.stalls import StallDetector

TIMEOUT = 10.0


class Ear:
    """Subscribes a channel, and notes what it hears."""

    def __init__(self, bus: Bus, channel: str) -> None:
        self.bus, self.channel = bus, channel
        self.messages: list[bytes] = []
        self.heard_at: list[float] = []
        self.gaps: list[str] = []
        self.subscription = bus.subscribe(channel, self._hear, self._miss)

    def _hear(self, message: bytes) -> None:
        self.heard_at.append(time.monotonic())
        self.messages.append(message)

    def _miss(self) -> None:
        self.gaps.append(threading.current_thread().name)

    def wait_told(self, times: int = 1) -> None:
        wait_until(lambda: len(self.gaps) >= times, f"gap {times} to be told", TIMEOUT)

    def wait_confirmed(self) -> None:
        asked = time.monotonic()
        wait_until(lambda: self.bus.confirmed_at(self.channel) > asked, "an answered ping", TIMEOUT)

    def wait_message(self, say: Callable[[], object]) -> None:
        before = len(self.messages)
        wait_until(lambda: say() and len(self.messages) > before, "a message", TIMEOUT)


def channel(namespace: str, name: str = "x") -> str:
    return f"{namespace}:{{cache:{name}}}:bus"


def publish(backend: Backend, where: str, message: str = "m") -> int:
    return backend.run(Command("SPUBLISH", (where,), (message,), int))


def lines(raw: Raw) -> int:
    """How many connections the server has that are subscribed."""
    return sum(int(client["ssub"]) > 0 for client in raw.client_list())


def growth(count: Callable[[], float]) -> float:
    """How much a count grows in a second; the length is what is measured, nothing is waited for."""
    before, begin = count(), time.monotonic()
    time.sleep(1.0)
    return (count() - before) / max(1.0, time.monotonic() - begin)


# Bringing messages


@pytest.mark.every_server
def test_it_brings_messages_and_tells_of_gaps(backend: Backend, namespace: str) -> None:
    ear = Ear(backend.bus, channel(namespace))
    ear.wait_told()
    publish(backend, ear.channel, "one")
    wait_until(lambda: ear.messages == [b"one"], "the message")
    ear.wait_confirmed()
    ear.subscription.close()
    publish(backend, ear.channel, "two")
    again = Ear(backend.bus, ear.channel)
    again.wait_message(lambda: publish(backend, ear.channel, "three"))
    assert ear.messages == [b"one"]


@pytest.mark.every_server
def test_many_channels_share_their_lines(backend: Backend, namespace: str) -> None:
    ears = [Ear(backend.bus, channel(namespace, f"c{number}")) for number in range(500)]
    for ear in ears:
        ear.wait_told()
    for number in (0, 250, 499):
        ears[number].wait_message(partial(publish, backend, ears[number].channel))
    for ear in ears[1:]:
        ear.subscription.close()
    ears[0].wait_message(partial(publish, backend, ears[0].channel))
    ears[0].wait_confirmed()


def test_the_last_subscription_may_close_and_another_come(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(own_server.url)
    with own_server.client() as raw:
        first = Ear(backend.bus, channel(namespace, "first"))
        first.wait_told()
        first.wait_confirmed()
        first.subscription.close()
        wait_until(
            lambda: not any(each["cmd"].endswith(("subscribe", "ping")) for each in raw.client_list()), "the end"
        )
        second = Ear(backend.bus, channel(namespace, "second"))
        second.wait_told()
        second.wait_message(partial(publish, backend, second.channel))


def test_subscribing_again_at_once_is_told_and_confirmed(backend: Backend, namespace: str) -> None:
    """Whether the thread has noticed the end of the first, or is about to, or never does."""
    for number in range(12):
        first = Ear(backend.bus, channel(namespace, f"c{number}"))
        first.wait_told()
        first.subscription.close()
        if number % 2:
            time.sleep(0.0005 * (number % 8))
        second = Ear(backend.bus, first.channel)
        second.wait_told()
        second.wait_confirmed()
        second.wait_message(partial(publish, backend, second.channel))


def test_gaps_are_told_on_the_bus_thread_only(backend: Backend, namespace: str) -> None:
    """Whoever subscribes may hold a lock that on_gap takes."""
    lock, told = threading.Lock(), threading.Event()

    def on_gap() -> None:
        with lock:
            told.set()

    Ear(backend.bus, channel(namespace)).wait_confirmed()
    with lock:
        backend.bus.subscribe(channel(namespace), lambda _: None, on_gap)
    assert told.wait(TIMEOUT)
    third = Ear(backend.bus, channel(namespace))
    third.wait_told()
    assert third.gaps == ["agentperf-bus"]


def test_a_faulty_listener_harms_nobody_else(backend: Backend, namespace: str) -> None:
    def fail(*_: object) -> None:
        raise ValueError

    backend.bus.subscribe(channel(namespace), fail, fail)
    ear = Ear(backend.bus, channel(namespace))
    ear.wait_told()
    ear.wait_message(partial(publish, backend, ear.channel))


def test_a_fault_of_its_own_costs_a_line_never_the_thread(
    backend: Backend, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear(backend.bus, channel(namespace))
    ear.wait_confirmed()

    def read(line: BusConnection) -> Iterator[None]:
        monkeypatch.undo()
        raise ValueError

    monkeypatch.setattr(BusConnection, "read", read)
    ear.wait_told(3)
    ear.wait_message(partial(publish, backend, ear.channel))


# Lines that break, and servers that refuse


def test_it_comes_back_after_a_cut_and_says_so(
    proxy: Proxy, connect: Callable[..., Backend], namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = connect(proxy.url)
    ear = Ear(backend.bus, channel(namespace))
    ear.wait_told()
    ear.wait_confirmed()
    proxy.cut()
    ear.wait_told(3)  # lost, and there again
    ear.wait_message(partial(publish, backend, ear.channel))
    ear.wait_confirmed()
    told = [record.message for record in caplog.records if record.message.startswith("bus:")]
    assert len(told) == 2, told
    assert str(proxy.port) in told[0]
    assert told[1].endswith("is back")


def test_a_lost_line_is_told_to_the_backend(proxy: Proxy, connect: Callable[..., Backend], namespace: str) -> None:
    backend, trouble = connect(proxy.url), threading.Event()
    bus = Bus(backend._connector, backend._topology.node_for, lambda: None, on_trouble=trouble.set)
    try:
        ear = Ear(bus, channel(namespace))
        ear.wait_confirmed()
        assert not trouble.is_set()
        proxy.cut()
        assert trouble.wait(TIMEOUT)
    finally:
        bus.close()


def test_a_server_that_is_down_is_tried_with_rests_until_it_is_up(
    proxy: Proxy, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(proxy.url)
    ear = Ear(backend.bus, channel(namespace))
    ear.wait_told()
    proxy.close_port()
    ear.wait_told(2)
    assert backend.bus.confirmed_at(ear.channel) == 0.0
    proxy.open_port()
    ear.wait_told(3)
    ear.wait_confirmed()


def test_a_user_who_may_not_subscribe_storms_nobody(
    own_server: Server, connect: Callable[..., Backend], namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    with own_server.client() as raw:
        raw.acl_setuser("worker", True, passwords="+secret", keys="*", channels="*", commands=["+@all", "-ssubscribe"])
        backend = connect(own_server.url.replace("redis://", "redis://worker:secret@"))
        ears = [Ear(backend.bus, channel(namespace, name)) for name in "ab"]
        wait_until(lambda: "NOPERM" in caplog.text, "the refusal")
        assert growth(lambda: raw.info("stats")["total_connections_received"]) <= 1
        assert [ear.gaps for ear in ears] == [[], []]
        assert caplog.text.count("NOPERM") == 1


def test_a_refused_channel_does_not_keep_the_others(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    with own_server.client() as raw:
        raw.acl_setuser(
            "worker", True, passwords="+secret", keys="*", channels=[channel(namespace, "may")], commands=["+@all"]
        )
        backend = connect(own_server.url.replace("redis://", "redis://worker:secret@"))
        refused = Ear(backend.bus, channel(namespace, "may_not"))
        allowed = Ear(backend.bus, channel(namespace, "may"))
        allowed.wait_told()
        allowed.wait_confirmed()
        allowed.wait_message(lambda: raw.execute_command("SPUBLISH", allowed.channel, "m"))
        assert len(allowed.gaps) == 1
        assert refused.gaps == []


def test_a_server_at_its_maxclients_is_not_stormed(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(own_server.url)
    backend.run(Command("PING", (), (), bytes))
    with own_server.client() as raw:
        raw.config_set("maxclients", len(raw.client_list()))

        def rejected() -> int:
            return int(raw.info("stats")["rejected_connections"])

        ear = Ear(backend.bus, channel(namespace))
        wait_until(lambda: rejected() > 3, "some attempts")
        assert growth(rejected) <= 20
        assert ear.gaps == []
        raw.config_set("maxclients", 1000)
        ear.wait_told()
        ear.wait_confirmed()


class SlowNode:
    """A node that answers in order, as every server does, and takes its time over each answer."""

    def __init__(self, subscribe_s: float, ping_s: float) -> None:
        self._takes_s = {b"ssubscribe": subscribe_s, b"ping": ping_s}
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self.connections: list[socket.socket] = []
        self.pings = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._door.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        reader: Any = hiredis.Reader()
        with contextlib.suppress(OSError):
            while data := connection.recv(4096):
                reader.feed(data)
                while words := reader.gets():
                    word = words[0].lower()
                    time.sleep(self._takes_s[word])
                    if word == b"ping":
                        self.pings += 1
                        connection.sendall(b"*2\r\n$4\r\npong\r\n$0\r\n\r\n")
                    else:
                        name = words[1]
                        connection.sendall(b"*3\r\n$10\r\nssubscribe\r\n$%d\r\n%s\r\n:1\r\n" % (len(name), name))

    def close(self) -> None:
        self._door.close()
        for connection in self.connections:
            connection.close()


def test_a_subscription_confirmed_while_a_ping_is_open_costs_nothing(
    connect: Callable[..., Backend], namespace: str
) -> None:
    node = SlowNode(subscribe_s=0.1, ping_s=0.15)
    backend = connect(f"redis://127.0.0.1:{node.port}/0")
    ears: list[Ear] = []
    try:
        while node.pings < 6:
            ears.append(Ear(backend.bus, channel(namespace, f"c{len(ears)}")))
            backend.bus.confirmed_at(ears[-1].channel)
            ears[-1].wait_told()
        ears[0].wait_confirmed()
        assert len(node.connections) == 1
        assert {len(ear.gaps) for ear in ears} == {1}
    finally:
        backend.bus.close()
        node.close()


# A Cluster


def owner(server: Server, where: str) -> Node:
    return server.nodes[key_slot(where) * len(server.nodes) // SLOTS]


def channel_of(server: Server, namespace: str, node: Node) -> str:
    names = (channel(namespace, f"c{number}") for number in range(10_000))
    return next(name for name in names if owner(server, name) is node)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["killed", "paused"])
def test_a_dead_node_does_not_keep_the_messages_of_the_others(
    start_server: Callable[..., Server], connect: Callable[..., Backend], namespace: str, how: str
) -> None:
    server = start_server("cluster", "--cluster-require-full-coverage", "no")
    dead, healthy, _ = server.nodes
    backend = connect(server.url)
    lost = Ear(backend.bus, channel_of(server, namespace, dead))
    ear = Ear(backend.bus, channel_of(server, namespace, healthy))
    lost.wait_confirmed()
    ear.wait_confirmed()

    (dead.kill if how == "killed" else dead.pause)()
    wait_until(lambda: backend.bus.confirmed_at(lost.channel) == 0.0, "the loss", TIMEOUT)
    delays = []
    with healthy.client() as raw, healthy.client() as asked, StallDetector(asked.ping) as stalls:
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            sent = time.monotonic()
            raw.execute_command("SPUBLISH", ear.channel, "m")
            wait_until(lambda: ear.messages, "the message", TIMEOUT)
            delays.append(stalls.own(sent, ear.heard_at[-1]))
            ear.messages.clear()
            time.sleep(0.02)
    newcomer = Ear(backend.bus, channel(namespace, "new"))
    if owner(server, newcomer.channel) is not dead:
        newcomer.wait_told()
    assert max(delays) < 0.5
    assert len(ear.gaps) == 1, "the healthy line was never touched"

    told = len(lost.gaps)
    dead.start() if how == "killed" else dead.resume()
    lost.wait_told(told + 1)
    lost.wait_confirmed()


def test_a_channel_whose_slot_moves_is_followed(
    start_server: Callable[..., Server], connect: Callable[..., Backend], namespace: str
) -> None:
    server = start_server("cluster")
    backend = connect(server.url)
    moving, staying = (Ear(backend.bus, channel_of(server, namespace, node)) for node in server.nodes[:2])
    moving.wait_confirmed()
    staying.wait_confirmed()
    target = server.nodes[1]
    with target.client() as raw:
        target_id = raw.execute_command("CLUSTER", "MYID")
    for node in (target, server.nodes[0], server.nodes[2]):
        with node.client() as raw:
            raw.execute_command("CLUSTER", "SETSLOT", key_slot(moving.channel), "NODE", target_id)
    moving.wait_told(3)
    moving.wait_confirmed()
    with target.client() as raw:
        moving.wait_message(lambda: raw.execute_command("SPUBLISH", moving.channel, "m") == 1)
    assert len(staying.gaps) == 1


# Forks


def in_child(work: Callable[[], bool]) -> bool:
    """Fork, and return what the work returns in the child."""
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = work()
        finally:
            os._exit(0 if good else 1)
    return os.waitpid(child, 0)[1] == 0


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def bus_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("agentperf-bus")]


def test_a_child_that_does_not_listen_has_neither_thread_nor_connection(backend: Backend, namespace: str) -> None:
    ear = Ear(backend.bus, channel(namespace))
    ear.wait_confirmed()
    before = descriptors()

    def grandchild() -> bool:
        return bus_threads() == [] and descriptors() < before

    def child() -> bool:
        return bus_threads() == [] and descriptors() < before and in_child(grandchild)

    assert in_child(child)
    ear.wait_message(partial(publish, backend, ear.channel))
    assert len(ear.gaps) == 1, "the parent's line is untouched by its children"


@pytest.mark.every_server
def test_a_child_subscribes_for_itself(backend: Backend, namespace: str) -> None:
    parents = Ear(backend.bus, channel(namespace))
    parents.wait_confirmed()

    def child() -> bool:
        ear = Ear(backend.bus, channel(namespace))
        ear.wait_told()
        ear.wait_confirmed()
        ear.wait_message(partial(publish, backend, ear.channel))
        parents.subscription.close()  # the parent's: nothing to end here
        backend.bus.close()
        return parents.messages == []

    assert in_child(child)
    parents.wait_confirmed()


def test_a_bus_closed_in_the_parent_is_closed_in_the_child(backend: Backend, namespace: str) -> None:
    ear = Ear(backend.bus, channel(namespace))
    ear.wait_told()
    backend.bus.close()

    def child() -> bool:
        backend.bus.subscribe(channel(namespace), lambda _: None, lambda: None)
        return bus_threads() == []

    assert in_child(child)


def test_a_cache_listens_once_in_a_forked_child(own_server: Server, connect: Callable[..., Backend], raw: Raw) -> None:
    backend = connect(own_server.url)
    cache = LRUCache(backend=backend, local_size=10)
    cache.put("k", 1)
    assert cache.get("k") == 1

    def child() -> bool:
        wait_until(lambda: cache.get("k") == 1 and len(cache._shared_state.local or ()), "a copy", TIMEOUT)
        listener = backend.bus._listener
        heard = [] if listener is None else listener._subscribers._of[cache._shared_state.keys.bus]
        return len(heard) == 1

    assert in_child(child)
