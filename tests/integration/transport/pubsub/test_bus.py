"""On real servers, the message bus delivers messages, reports every gap, and recovers from faults."""

from __future__ import annotations

import contextlib
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
from agentperf_redis.keys import SLOTS, key_slot
from agentperf_redis.transport.pubsub.bus import Bus
from agentperf_redis.transport.pubsub.connection import BusConnection
from tests.support.forks import in_child
from tests.support.proxy import Proxy
from tests.support.servers import Node, Raw, Server, wait_until
from tests.support.stalls import StallDetector

TIMEOUT = 10.0


class Recorder:
    """Subscribes to a channel, and records the messages and the reported gaps."""

    def __init__(self, bus: Bus, channel: str) -> None:
        self.bus, self.channel = bus, channel
        self.messages: list[bytes] = []
        self.received_at: list[float] = []
        self.gaps: list[str] = []
        self.subscription = bus.subscribe(channel, self._on_message, self._on_gap)

    def _on_message(self, message: bytes) -> None:
        self.received_at.append(time.monotonic())
        self.messages.append(message)

    def _on_gap(self) -> None:
        self.gaps.append(threading.current_thread().name)

    def wait_gap(self, times: int = 1) -> None:
        wait_until(lambda: len(self.gaps) >= times, f"gap {times} to be reported", TIMEOUT)

    def wait_confirmed(self) -> None:
        probe = time.monotonic()
        wait_until(lambda: self.bus.confirmed_at(self.channel) > probe, "an answered ping", TIMEOUT)

    def wait_message(self, send: Callable[[], object]) -> None:
        before = len(self.messages)
        wait_until(lambda: send() and len(self.messages) > before, "a message", TIMEOUT)


def channel(namespace: str, name: str = "x") -> str:
    return f"{namespace}:{{cache:{name}}}:bus"


def publish(backend: Backend, where: str, message: str = "m") -> int:
    return backend.run(Command("SPUBLISH", (where,), (message,), int))


def lines(raw: Raw) -> int:
    """Return the number of connections to the server that have a subscription."""
    return sum(int(client["ssub"]) > 0 for client in raw.client_list())


def growth(count: Callable[[], float]) -> float:
    """Return by how much a count grows per second. The sleep is the measured time, not a wait for a condition."""
    before, begin = count(), time.monotonic()
    time.sleep(1.0)
    return (count() - before) / max(1.0, time.monotonic() - begin)


# Delivery


def test_bus_delivers_messages_and_reports_gaps(backend: Backend, namespace: str) -> None:
    recorder = Recorder(backend.bus, channel(namespace))
    recorder.wait_gap()
    publish(backend, recorder.channel, "one")
    wait_until(lambda: recorder.messages == [b"one"], "the message")
    recorder.wait_confirmed()
    recorder.subscription.close()
    publish(backend, recorder.channel, "two")
    again = Recorder(backend.bus, recorder.channel)
    again.wait_message(lambda: publish(backend, recorder.channel, "three"))
    assert recorder.messages == [b"one"]


def test_many_channels_share_their_connections(backend: Backend, namespace: str) -> None:
    recorders = [Recorder(backend.bus, channel(namespace, f"c{number}")) for number in range(500)]
    for recorder in recorders:
        recorder.wait_gap()
    for number in (0, 250, 499):
        recorders[number].wait_message(partial(publish, backend, recorders[number].channel))
    for recorder in recorders[1:]:
        recorder.subscription.close()
    recorders[0].wait_message(partial(publish, backend, recorders[0].channel))
    recorders[0].wait_confirmed()


def test_new_subscription_works_after_the_last_closed(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(own_server.url)
    with own_server.client() as raw:
        first = Recorder(backend.bus, channel(namespace, "first"))
        first.wait_gap()
        first.wait_confirmed()
        first.subscription.close()
        wait_until(
            lambda: not any(each["cmd"].endswith(("subscribe", "ping")) for each in raw.client_list()), "the end"
        )
        second = Recorder(backend.bus, channel(namespace, "second"))
        second.wait_gap()
        second.wait_message(partial(publish, backend, second.channel))


def test_immediate_resubscription_is_notified_and_confirmed(backend: Backend, namespace: str) -> None:
    """The bus thread may notice the end of the first subscription before or after the second subscription begins."""
    for number in range(12):
        first = Recorder(backend.bus, channel(namespace, f"c{number}"))
        first.wait_gap()
        first.subscription.close()
        if number % 2:
            time.sleep(0.0005 * (number % 8))
        second = Recorder(backend.bus, first.channel)
        second.wait_gap()
        second.wait_confirmed()
        second.wait_message(partial(publish, backend, second.channel))


def test_gaps_are_reported_on_bus_thread_only(backend: Backend, namespace: str) -> None:
    """`subscribe` must not call `on_gap` itself: its caller may hold a lock that `on_gap` takes."""
    lock, reported = threading.Lock(), threading.Event()

    def on_gap() -> None:
        with lock:
            reported.set()

    Recorder(backend.bus, channel(namespace)).wait_confirmed()
    with lock:
        backend.bus.subscribe(channel(namespace), lambda _: None, on_gap)
    assert reported.wait(TIMEOUT)
    third = Recorder(backend.bus, channel(namespace))
    third.wait_gap()
    assert third.gaps == ["agentperf-bus"]


def test_faulty_listener_does_not_affect_others(backend: Backend, namespace: str) -> None:
    def fail(*_: object) -> None:
        raise ValueError

    backend.bus.subscribe(channel(namespace), fail, fail)
    recorder = Recorder(backend.bus, channel(namespace))
    recorder.wait_gap()
    recorder.wait_message(partial(publish, backend, recorder.channel))


def test_internal_fault_closes_connection_but_thread_survives(
    backend: Backend, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(backend.bus, channel(namespace))
    recorder.wait_confirmed()

    def read(connection: BusConnection) -> Iterator[None]:
        monkeypatch.undo()
        raise ValueError

    monkeypatch.setattr(BusConnection, "read", read)
    recorder.wait_gap(3)
    recorder.wait_message(partial(publish, backend, recorder.channel))


# Broken connections, and refusals


def test_bus_reconnects_after_cut_and_logs_it(
    proxy: Proxy, connect: Callable[..., Backend], namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = connect(proxy.url)
    recorder = Recorder(backend.bus, channel(namespace))
    recorder.wait_gap()
    recorder.wait_confirmed()
    proxy.cut()
    recorder.wait_gap(3)  # the second gap reports the lost connection; the third gap reports the new connection
    recorder.wait_message(partial(publish, backend, recorder.channel))
    recorder.wait_confirmed()
    reported = [record.message for record in caplog.records if record.message.startswith("bus:")]
    assert len(reported) == 2, reported
    assert str(proxy.port) in reported[0]
    assert reported[1].endswith("is back")


def test_lost_connection_is_reported_to_the_backend(
    proxy: Proxy, connect: Callable[..., Backend], namespace: str
) -> None:
    backend, lost = connect(proxy.url), threading.Event()
    bus = Bus(backend._connector, backend._topology.node_for, lambda: None, on_trouble=lost.set)
    try:
        recorder = Recorder(bus, channel(namespace))
        recorder.wait_confirmed()
        assert not lost.is_set()
        proxy.cut()
        assert lost.wait(TIMEOUT)
    finally:
        bus.close()


def test_bus_retries_until_server_is_up_again(proxy: Proxy, connect: Callable[..., Backend], namespace: str) -> None:
    backend = connect(proxy.url)
    recorder = Recorder(backend.bus, channel(namespace))
    recorder.wait_gap()
    proxy.close_port()
    recorder.wait_gap(2)
    assert backend.bus.confirmed_at(recorder.channel) == 0.0
    proxy.open_port()
    recorder.wait_gap(3)
    recorder.wait_confirmed()


def test_denied_subscription_does_not_flood_the_server(
    own_server: Server, connect: Callable[..., Backend], namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    with own_server.client() as raw:
        raw.acl_setuser("worker", True, passwords="+secret", keys="*", channels="*", commands=["+@all", "-ssubscribe"])
        backend = connect(own_server.url.replace("redis://", "redis://worker:secret@"))
        recorders = [Recorder(backend.bus, channel(namespace, name)) for name in "ab"]
        wait_until(lambda: "NOPERM" in caplog.text, "the refusal")
        assert growth(lambda: raw.info("stats")["total_connections_received"]) <= 1
        assert [recorder.gaps for recorder in recorders] == [[], []]
        assert caplog.text.count("NOPERM") == 1


def test_refused_channel_does_not_block_other_channels(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    with own_server.client() as raw:
        raw.acl_setuser(
            "worker", True, passwords="+secret", keys="*", channels=[channel(namespace, "may")], commands=["+@all"]
        )
        backend = connect(own_server.url.replace("redis://", "redis://worker:secret@"))
        refused = Recorder(backend.bus, channel(namespace, "may_not"))
        allowed = Recorder(backend.bus, channel(namespace, "may"))
        allowed.wait_gap()
        allowed.wait_confirmed()
        allowed.wait_message(lambda: raw.execute_command("SPUBLISH", allowed.channel, "m"))
        assert len(allowed.gaps) == 1
        assert refused.gaps == []


@pytest.mark.thorough
def test_server_at_maxclients_is_not_flooded(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(own_server.url)
    backend.run(Command("PING", (), (), bytes))
    with own_server.client() as raw:
        raw.config_set("maxclients", len(raw.client_list()))

        def rejected() -> int:
            return int(raw.info("stats")["rejected_connections"])

        recorder = Recorder(backend.bus, channel(namespace))
        wait_until(lambda: rejected() > 3, "some attempts")
        assert growth(rejected) <= 20
        assert recorder.gaps == []
        raw.config_set("maxclients", 1000)
        recorder.wait_gap()
        recorder.wait_confirmed()


class SlowNode:
    """A node that answers slowly. Like every server, it answers requests in the order of their arrival."""

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


@pytest.mark.thorough
def test_subscription_confirmed_during_ping_keeps_the_connection(
    connect: Callable[..., Backend], namespace: str
) -> None:
    node = SlowNode(subscribe_s=0.1, ping_s=0.15)
    backend = connect(f"redis://127.0.0.1:{node.port}/0")
    recorders: list[Recorder] = []
    try:
        while node.pings < 6:
            recorders.append(Recorder(backend.bus, channel(namespace, f"c{len(recorders)}")))
            backend.bus.confirmed_at(recorders[-1].channel)
            recorders[-1].wait_gap()
        recorders[0].wait_confirmed()
        assert len(node.connections) == 1
        assert {len(recorder.gaps) for recorder in recorders} == {1}
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
def test_dead_node_does_not_delay_other_nodes(
    start_server: Callable[..., Server], connect: Callable[..., Backend], namespace: str, how: str
) -> None:
    server = start_server("cluster", "--cluster-require-full-coverage", "no")
    dead, healthy, _ = server.nodes
    backend = connect(server.url)
    lost = Recorder(backend.bus, channel_of(server, namespace, dead))
    recorder = Recorder(backend.bus, channel_of(server, namespace, healthy))
    lost.wait_confirmed()
    recorder.wait_confirmed()

    (dead.kill if how == "killed" else dead.pause)()
    wait_until(lambda: backend.bus.confirmed_at(lost.channel) == 0.0, "the loss", TIMEOUT)
    delays = []
    with healthy.client() as raw, healthy.client() as probe, StallDetector(probe.ping) as stalls:
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            sent = time.monotonic()
            raw.execute_command("SPUBLISH", recorder.channel, "m")
            wait_until(lambda: recorder.messages, "the message", TIMEOUT)
            delays.append(stalls.own(sent, recorder.received_at[-1]))
            recorder.messages.clear()
            time.sleep(0.02)
    added = Recorder(backend.bus, channel(namespace, "new"))
    if owner(server, added.channel) is not dead:
        added.wait_gap()
    assert max(delays) < 0.5
    assert len(recorder.gaps) == 1, "the healthy connection is unaffected"

    reported = len(lost.gaps)
    dead.start() if how == "killed" else dead.resume()
    lost.wait_gap(reported + 1)
    lost.wait_confirmed()


@pytest.mark.thorough
def test_subscription_follows_a_moved_slot(
    start_server: Callable[..., Server], connect: Callable[..., Backend], namespace: str
) -> None:
    server = start_server("cluster")
    backend = connect(server.url)
    moving, staying = (Recorder(backend.bus, channel_of(server, namespace, node)) for node in server.nodes[:2])
    moving.wait_confirmed()
    staying.wait_confirmed()
    target = server.nodes[1]
    with target.client() as raw:
        target_id = raw.execute_command("CLUSTER", "MYID")
    for node in (target, server.nodes[0], server.nodes[2]):
        with node.client() as raw:
            raw.execute_command("CLUSTER", "SETSLOT", key_slot(moving.channel), "NODE", target_id)
    moving.wait_gap(3)
    moving.wait_confirmed()
    with target.client() as raw:
        moving.wait_message(lambda: raw.execute_command("SPUBLISH", moving.channel, "m") == 1)
    assert len(staying.gaps) == 1


# Forks


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def bus_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("agentperf-bus")]


def test_forked_child_starts_without_thread_or_connection(backend: Backend, namespace: str) -> None:
    recorder = Recorder(backend.bus, channel(namespace))
    recorder.wait_confirmed()
    before = descriptors()

    def grandchild() -> None:
        assert bus_threads() == []
        assert descriptors() < before

    def child() -> None:
        assert bus_threads() == []
        assert descriptors() < before
        in_child(grandchild)

    in_child(child)
    recorder.wait_message(partial(publish, backend, recorder.channel))
    assert len(recorder.gaps) == 1, "the children do not affect the connection of the parent"


def test_forked_child_subscribes_on_its_own(backend: Backend, namespace: str) -> None:
    parents = Recorder(backend.bus, channel(namespace))
    parents.wait_confirmed()

    def child() -> None:
        recorder = Recorder(backend.bus, channel(namespace))
        recorder.wait_gap()
        recorder.wait_confirmed()
        recorder.wait_message(partial(publish, backend, recorder.channel))
        parents.subscription.close()  # the subscription belongs to the parent, so `close` does nothing here
        backend.bus.close()
        assert parents.messages == []

    in_child(child)
    parents.wait_confirmed()


def test_bus_closed_before_fork_stays_closed(backend: Backend, namespace: str) -> None:
    recorder = Recorder(backend.bus, channel(namespace))
    recorder.wait_gap()
    backend.bus.close()

    def child() -> None:
        backend.bus.subscribe(channel(namespace), lambda _: None, lambda: None)
        assert bus_threads() == []

    in_child(child)


def test_cache_subscribes_once_in_forked_child(own_server: Server, connect: Callable[..., Backend], raw: Raw) -> None:
    backend = connect(own_server.url)
    cache = LRUCache(backend=backend, local_size=10)
    cache.put("k", 1)
    assert cache.get("k") == 1

    def child() -> None:
        wait_until(lambda: cache.get("k") == 1 and len(cache._shared_state.local or ()), "a copy", TIMEOUT)
        listener = backend.bus._listener
        subscriptions = [] if listener is None else listener._subscribers._of[cache._shared_state.keys.bus]
        assert len(subscriptions) == 1

    in_child(child)
