"""A TCP proxy in front of a server, with faults on demand.

It parses enough RESP to find the ends of requests and replies, and handles the requests of a connection one by one. A
fault such as "the reply of the third EVALSHA is lost" therefore affects exactly that reply. Handshakes (HELLO, AUTH,
CLIENT, SELECT, PING) are forwarded and never counted. A connection that subscribes becomes a plain pipe.

    proxy.reset_after_reply()                    # the next request runs, its reply is lost, the connection is reset
    proxy.half_reply(only="EVALSHA", nth=2)      # the second EVALSHA from now on
    held = proxy.hold(only=Script("lb/acquire")) # the request stays in flight until the test delivers it
    proxy.cut(); proxy.close_port(); proxy.open_port()
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

from agentperf_redis.script import Script

Request: TypeAlias = tuple[bytes, ...]
"""The words of a request, the command first and in capitals."""
Only: TypeAlias = str | Script | Callable[[Request], bool] | None
"""Requests that a fault affects: a command's name, a script, a predicate, or all."""

_HANDSHAKE = {b"HELLO", b"AUTH", b"CLIENT", b"SELECT", b"PING", b"COMMAND"}
_SUBSCRIBE = {b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR"}
_SCRIPT_CALLS = {b"EVALSHA", b"EVAL", b"EVALSHA_RO", b"EVAL_RO"}
_TIMEOUT = 10.0

F = TypeVar("F", bound="Fault")


class Reset(Exception):
    """Raised to reset the connection to the client."""


@dataclass(eq=False)
class Fault:
    """A fault that will affect some requests.

    Attributes:
        caught: set after the first effect of the fault.
        requests: the affected requests.
    """

    act: Callable[[Connection, Request, bytes], Awaitable[None]]
    only: Only
    nth: int
    times: float
    caught: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)

    def wait(self, timeout: float = _TIMEOUT) -> Request:
        """Wait until the fault has happened, and return the first affected request."""
        if not self.caught.wait(timeout):
            raise TimeoutError(f"no request met the fault within {timeout:g} s")
        return self.requests[0]


class Held(Fault):
    """A request that the proxy holds until `deliver` is called or a time limit has passed."""

    release: asyncio.Event
    replies: list[bytes]
    answered: threading.Event
    loop: asyncio.AbstractEventLoop

    def deliver(self, timeout: float = _TIMEOUT) -> bytes:
        """Send the request to the server now, and return the raw reply. A closed client does not get the reply."""
        self.wait(timeout)
        self.loop.call_soon_threadsafe(self.release.set)
        return self.delivered(timeout)

    def delivered(self, timeout: float = _TIMEOUT) -> bytes:
        """Wait until the server has replied, and return its raw reply."""
        if not self.answered.wait(timeout):
            raise TimeoutError(f"the held request got no reply within {timeout:g} s")
        return self.replies[0]


class Kept(Fault):
    """A reply that the proxy holds until `let_go`.

    Attributes:
        answered: set once the server has executed the request.
    """

    release: asyncio.Event
    answered: threading.Event
    loop: asyncio.AbstractEventLoop

    def let_go(self) -> None:
        """Send the reply to the client now."""
        self.loop.call_soon_threadsafe(self.release.set)


class Connection:
    """The connection of one client, and the connection to the server that serves this client."""

    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.client_reader, self.client_writer = client
        self.server_reader, self.server_writer = server

    async def ask(self, raw: bytes) -> bytes:
        """Send a request to the server, and return its reply."""
        self.server_writer.write(raw)
        await self.server_writer.drain()
        return await read_value(self.server_reader)

    async def answer(self, raw: bytes) -> None:
        """Send a reply to the client."""
        self.client_writer.write(raw)
        await self.client_writer.drain()

    def reset(self) -> None:
        """Close the client's connection with an RST."""
        reset(self.client_writer)

    async def pipe(self) -> None:
        """Forward everything in both directions until one side ends."""
        ways = (
            asyncio.create_task(_copy(self.client_reader, self.server_writer)),
            asyncio.create_task(_copy(self.server_reader, self.client_writer)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)


class Proxy:
    """The proxy. Its event loop runs in a thread of this process.

    Attributes:
        port: its port on 127.0.0.1.
        requests: every counted request, in order of arrival.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._faults: list[Fault] = []
        self._clients: dict[asyncio.Task[None], Connection | None] = {}
        """The task and the connection of each client. The connection is None until the server has accepted it."""
        self._listener: socket.socket | None = None
        self._swallowing = False
        self.requests: list[Request] = []
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.open_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    # Faults of selected requests

    def reset_before_request(self, *, only: Only = None, nth: int = 1, times: float = 1) -> Fault:
        """The request never reaches the server; the connection is reset."""

        async def act(connection: Connection, request: Request, raw: bytes) -> None:
            raise Reset

        return self._add(Fault(act, only, nth, times))

    def reset_after_reply(self, *, only: Only = None, nth: int = 1, times: float = 1) -> Fault:
        """The server executes the request; its reply is lost and the connection is reset."""

        async def act(connection: Connection, request: Request, raw: bytes) -> None:
            await connection.ask(raw)
            raise Reset

        return self._add(Fault(act, only, nth, times))

    def half_reply(self, *, only: Only = None, nth: int = 1, times: float = 1) -> Fault:
        """The server executes the request; half its reply arrives, then the connection ends."""

        async def act(connection: Connection, request: Request, raw: bytes) -> None:
            reply = await connection.ask(raw)
            await connection.answer(reply[: len(reply) // 2])
            connection.client_writer.close()  # prevents an RST, which could overtake the half reply
            raise Reset

        return self._add(Fault(act, only, nth, times))

    def swallow(self, *, only: Only = None, nth: int = 1, times: float = 1) -> Fault:
        """The server executes the request; its reply never arrives, and the connection stays open."""

        async def act(connection: Connection, request: Request, raw: bytes) -> None:
            await connection.ask(raw)

        return self._add(Fault(act, only, nth, times))

    def delay(self, seconds: float, *, only: Only = None, nth: int = 1, times: float = 1) -> Fault:
        """The reply arrives `seconds` late."""

        async def act(connection: Connection, request: Request, raw: bytes) -> None:
            reply = await connection.ask(raw)
            await asyncio.sleep(seconds)
            await connection.answer(reply)

        return self._add(Fault(act, only, nth, times))

    def keep_reply(self, *, only: Only = None, nth: int = 1) -> Kept:
        """The server executes the request; its reply arrives after `let_go`."""

        async def act(connection: Connection, request: Request, raw: bytes) -> None:
            reply = await connection.ask(raw)
            kept.answered.set()
            await kept.release.wait()
            await connection.answer(reply)

        kept = Kept(act, only, nth, 1)
        kept.release, kept.answered, kept.loop = asyncio.Event(), threading.Event(), self._loop
        self._add(kept)
        return kept

    def hold(self, *, only: Only = None, nth: int = 1, after: float | None = None, reset: bool = True) -> Held:
        """The request stays in flight until `deliver()`, or for `after` seconds, even if its client gives up.

        With `reset`, the client's connection is reset at once; otherwise the client waits until its timeout.
        """

        async def act(connection: Connection, request: Request, raw: bytes) -> None:
            if reset:
                connection.reset()
            # Use a separate connection, since the client's connection may be closed long before the delivery.
            reader, writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(held.release.wait(), after)
                writer.write(raw)
                reply = await read_value(reader)
            finally:
                writer.close()
            held.replies.append(reply)
            held.answered.set()
            if reset:
                raise Reset
            await connection.answer(reply)

        held = Held(act, only, nth, 1)
        held.replies, held.answered, held.loop = [], threading.Event(), self._loop
        held.release = asyncio.Event()
        self._add(held)
        return held

    # Faults of all requests

    def cut(self) -> None:
        """Reset every open connection. New ones are accepted as before."""
        self._call(self._cut())

    def close_port(self) -> None:
        """Refuse new connections, and reset the open ones."""
        self._call(self._close_port())

    def open_port(self) -> None:
        """Listen, always on the same port."""
        self._call(self._open_port())

    def go_silent(self) -> None:
        """Accept connections and requests but forward nothing, like a network that drops every packet."""
        self._swallowing = True

    def speak_again(self) -> None:
        """End `go_silent`. The dropped requests stay lost, so all connections are reset."""
        self._swallowing = False
        self.cut()

    def clear(self) -> None:
        """Remove all pending faults."""
        self._faults.clear()

    def count(self, only: Only = None) -> int:
        """Return how many of the requests counted so far match `only`."""
        return sum(matches(only, request) for request in self.requests)

    def close(self) -> None:
        """End the proxy and its thread."""

        async def end() -> None:
            await self._close_port()
            for task in self._clients:
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            await asyncio.sleep(0)  # closed transports notify their protocols in the loop's next round

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # The event loop

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT)

    def _add(self, fault: F) -> F:
        self._faults.append(fault)
        return fault

    async def _open_port(self) -> None:
        if self._listener is None:
            from tests.support.servers import free_port

            self.port = self.port or free_port()
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _close_port(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        await self._cut()

    async def _cut(self) -> None:
        for task, connection in self._clients.items():
            if connection is None:
                task.cancel()
            else:
                connection.reset()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next round

    def _accept(self, listener: socket.socket) -> None:
        """Accept a client. An asyncio server would leak the client if the server were closed just after the accept."""
        try:
            client, _ = listener.accept()
        except BlockingIOError:  # the client has already left
            return
        client.setblocking(False)
        task = self._loop.create_task(self._serve(client))
        self._clients[task] = None
        task.add_done_callback(partial(self._served, client))

    def _served(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        del self._clients[task]
        client.close()  # needed if the task was cancelled before it began

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=client)
        try:
            try:
                server = await asyncio.open_connection("127.0.0.1", self._target_port)
            except OSError:
                raise Reset from None
            try:
                task = asyncio.current_task()
                assert task is not None
                connection = self._clients[task] = Connection((reader, writer), server)
                while await self._handle_one(connection):
                    pass
            finally:
                server[1].close()
        except Reset:
            reset(writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side has closed, or the proxy has cancelled this task
        finally:
            writer.close()

    async def _handle_one(self, connection: Connection) -> bool:
        raw = await read_value(connection.client_reader)
        request = words(raw)
        if self._swallowing:
            return True
        if request[0] in _SUBSCRIBE:
            connection.server_writer.write(raw)
            await connection.pipe()
            return False
        if request[0] not in _HANDSHAKE:
            self.requests.append(request)
            fault = self._fault_for(request)
            if fault is not None:
                fault.requests.append(request)
                fault.caught.set()
                await fault.act(connection, request, raw)
                return True
        await connection.answer(await connection.ask(raw))
        return True

    def _fault_for(self, request: Request) -> Fault | None:
        for fault in self._faults:
            if matches(fault.only, request):
                fault.nth -= 1
                if fault.nth <= 0:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault
        return None


def matches(only: Only, request: Request) -> bool:
    """Return whether a request matches the filter of a fault."""
    if only is None:
        return True
    if isinstance(only, str):
        return request[0] == only.upper().encode()
    if isinstance(only, Script):
        return request[0] in _SCRIPT_CALLS and request[1] in (only.sha.encode(), only.source.encode())
    return only(request)


def words(raw: bytes) -> Request:
    """Split a request from `read_value` into its words."""
    found: list[bytes] = []
    at = raw.index(b"\r\n") + 2
    while at < len(raw):
        end = raw.index(b"\r\n", at)
        size = int(raw[at + 1 : end])
        found.append(raw[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    found[0] = found[0].upper()
    return tuple(found)


async def read_value(reader: asyncio.StreamReader) -> bytes:
    """Read one complete RESP2 value as raw bytes."""
    line = await reader.readuntil(b"\r\n")
    kind, size = line[:1], line[1:-2]
    if kind == b"$" and size != b"-1":
        return line + await reader.readexactly(int(size) + 2)
    if kind == b"*" and size != b"-1":
        return line + b"".join([await read_value(reader) for _ in range(int(size))])
    return line


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with an RST."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0 and not writer.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
