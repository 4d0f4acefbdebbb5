"""The two drivers: they do what flows describe, one blocking, one on an asyncio loop.

redis-py lives here as the maker of connections (TLS, handshake, parsing). Its pools and retries are not used: a
connection is held by one exchange at a time, and dropped on any exception before its reply was fully read, so that no
reply can reach the wrong caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

from redis.asyncio.connection import Connection as AsyncConnection
from redis.asyncio.connection import DefaultParser as AsyncDefaultParser
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.asyncio.connection import UnixDomainSocketConnection as AsyncUnixConnection
from redis.backoff import NoBackoff
from redis.connection import Connection, DefaultParser, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from agentperf_redis.address import Address, Kind
from agentperf_redis.command import Batch, Command, Flow, Hint, Pause, Reply, Step, Wait
from agentperf_redis.delivery import (
    Delivery,
    Exchange,
    ExchangeFailed,
    Node,
    Rest,
    ServerError,
    Topology,
    deliver,
)
from agentperf_redis.errors import AgentPerfError, BackendUnavailable

T = TypeVar("T")

Runnable = Command[T] | Batch[T] | Flow[T]

MAX_CONNECTIONS = 32
"""Exchanges under way at once per driver and process; the usual maxclients of 10,000 then serves 300 processes."""

_CONNECT_S = 5.0


class _WholeText:
    """Keeps error replies whole: redis-py cuts the code off the text and turns some into broken connections."""

    @staticmethod
    def parse_error(response: str) -> ResponseError:
        return ResponseError(response)


class _Parser(_WholeText, DefaultParser):  # type: ignore[misc, valid-type]  # redis-py picks the class at import
    pass


class _AsyncParser(_WholeText, AsyncDefaultParser):  # type: ignore[misc, valid-type]  # as above
    pass


class Connector:
    """Makes connections to the nodes of an address."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._embedded_path: str | None = None
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the lock."""
        self._lock = threading.Lock()

    def connection(self, node: Node) -> Connection:
        """Return a new blocking connection, not yet connected."""
        kwargs = self._kwargs(node, Retry(NoBackoff(), 0), _Parser)
        if node.port == 0:
            unix: Any = UnixDomainSocketConnection  # abstract to type checkers, though redis-py makes it all day
            return cast("Connection", unix(path=self._path(node), **kwargs))
        kind = SSLConnection if self._tls(node) else Connection
        return kind(host=node.host, port=node.port, **kwargs)

    async def async_connection(self, node: Node) -> AsyncConnection:
        """Return a new asyncio connection, not yet connected."""
        from redis.asyncio.retry import Retry as AsyncRetry

        kwargs = self._kwargs(node, AsyncRetry(NoBackoff(), 0), _AsyncParser)
        kwargs["socket_timeout"] = None  # one asyncio.timeout bounds the whole exchange
        if node.port == 0:
            path = await asyncio.to_thread(self._path, node)
            return cast("AsyncConnection", AsyncUnixConnection(path=path, **kwargs))
        kind = AsyncSSLConnection if self._tls(node) else AsyncConnection
        return kind(host=node.host, port=node.port, **kwargs)

    def _path(self, node: Node) -> str:
        if self.address.kind is not Kind.EMBEDDED:
            return node.host
        # Started at the first use only: after `agentperf down`, processes that still run must not bring it back.
        with self._lock:
            if self._embedded_path is None:
                from agentperf_redis.embedded import data_folder, ensure

                self._embedded_path = str(ensure(data_folder(node.host or None)))
            return self._embedded_path

    def _tls(self, node: Node) -> bool:
        return self.address.tls and node.port != 0

    def _kwargs(self, node: Node, retry: object, parser: type) -> dict[str, Any]:
        address = self.address
        kwargs: dict[str, Any] = {
            "username": address.option("sentinel_username") if node.sentinel else address.username,
            "password": address.option("sentinel_password") if node.sentinel else address.password,
            "db": 0 if node.sentinel else address.db,
            # RESP3 with maintenance notifications skips redis-py's check for bytes that belong to another reply
            "protocol": 2,
            "retry": retry,
            "parser_class": parser,
            "socket_timeout": _CONNECT_S,
            "socket_connect_timeout": _CONNECT_S,
            "driver_info": None,
        }
        if node.port != 0:
            kwargs["socket_keepalive"] = True
        if self._tls(node):
            wanted = address.option("ssl_cert_reqs") or "required"
            kwargs["ssl_cert_reqs"] = wanted
            kwargs["ssl_check_hostname"] = wanted == "required" and address.option("ssl_check_hostname") not in (
                "0",
                "false",
                "no",
            )
            for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
                if address.option(name):
                    kwargs[name] = address.option(name)
        return kwargs


class Executor:
    """Runs flows, blocking the calling thread. Safe to share between threads.

    Args:
        connector: makes the connections.
        topology: knows which node serves which key.
        deadline_s: seconds that one command may take in all.
        on_trouble: called after an exchange failed; the server that answers next may be another one.
    """

    def __init__(
        self, connector: Connector, topology: Topology, deadline_s: float, on_trouble: Callable[[], None]
    ) -> None:
        self._connector = connector
        self._topology = topology
        self._deadline_s = deadline_s
        self._on_trouble = on_trouble
        self._idle: dict[Node, deque[Connection]] = {}
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._closed = False

    def run(self, flow: Runnable[T]) -> T:
        """Run a flow to its end and return what it returns.

        Raises:
            AgentPerfError: what the flow lets pass.
        """
        if isinstance(flow, Command):
            return self._perform_command(flow)
        if isinstance(flow, Batch):
            flow = cast("Flow[T]", iter(flow))
        try:
            step = next(flow)
            while True:
                try:
                    answer = self._perform(step)
                except BaseException as error:  # noqa: BLE001  an interrupted flow still gives back what it holds
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    def close(self) -> None:
        """Close idle connections; those in use close as their exchange ends."""
        self._closed = True
        for stack in list(self._idle.values()):
            while stack:
                stack.pop().disconnect()

    def _perform(self, step: Step) -> Any:
        if isinstance(step, Command):
            return self._perform_command(step)
        if isinstance(step, Batch):
            return self._deliver(step.commands)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return _wait(step)

    def _perform_command(self, command: Command[T]) -> T:
        (result,) = self._deliver((command,))
        if isinstance(result, AgentPerfError):
            raise result
        return cast("T", result)

    def _deliver(self, commands: Sequence[Command[Any]]) -> list[Any]:
        if not commands:
            return []
        delivery = deliver(commands, self._topology, self._deadline_s)
        try:
            step = next(delivery)
            while True:
                if isinstance(step, Rest):
                    time.sleep(step.seconds)
                    step = delivery.send(None)
                    continue
                try:
                    replies = self._exchange(step)
                except ExchangeFailed as failed:
                    self._on_trouble()
                    step = delivery.throw(failed)
                else:
                    step = delivery.send(replies)
        except StopIteration as done:
            return cast("list[Any]", done.value)

    def _exchange(self, step: Exchange) -> list[Reply]:
        end = time.monotonic() + step.timeout_s
        if not self._places.acquire(timeout=step.timeout_s):
            raise ExchangeFailed(f"all {MAX_CONNECTIONS} connections of this process were busy", sent=False)
        try:
            stack = self._idle.get(step.node)
            if stack is None:
                stack = self._idle.setdefault(step.node, deque())
            fresh = False
            try:
                connection = stack.pop()
            except IndexError:
                connection = self._connect(step)
                fresh = True
            try:
                connection.send_packed_command((step.payload,), check_health=False)
                replies = [_read(connection, end) for _ in range(step.count)]
            except (RedisError, OSError) as error:
                connection.disconnect()
                if not fresh:  # the others were opened to the same server before; they are as dead
                    while stack:
                        with contextlib.suppress(IndexError):
                            stack.pop().disconnect()
                late = isinstance(error, RedisTimeoutError)
                raise ExchangeFailed(_words(error), sent=True, stale=not fresh and not late, silent=late) from None
            except BaseException:
                connection.disconnect()
                raise
            if self._closed:
                connection.disconnect()
            else:
                stack.append(connection)
            return replies
        finally:
            self._places.release()

    def _connect(self, step: Exchange) -> Connection:
        connection = None
        try:
            connection = self._connector.connection(step.node)
            connection._socket_connect_timeout = min(_CONNECT_S, step.timeout_s)  # noqa: SLF001  the property cannot be set
            connection.connect()
        except ResponseError as error:
            connection.disconnect() if connection else None
            raise _refused(error) from None
        except (RedisError, OSError) as error:
            connection.disconnect() if connection else None
            raise _unconnected(error) from None
        except BackendUnavailable as error:
            raise ExchangeFailed(error.reason, sent=False, final=True) from None
        return connection


def _read(connection: Connection, end: float) -> Reply:
    try:
        return connection.read_response(disable_decoding=True, timeout=max(0.001, end - time.monotonic()))
    except ResponseError as error:
        return ServerError(str(error))


def _wait(step: Wait) -> bool:
    event = threading.Event()
    step.hint.call_when_given(event.set)
    try:
        return event.wait(step.seconds)
    finally:
        step.hint.forget(event.set)


def _words(error: BaseException) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _unconnected(error: RedisError | OSError) -> ExchangeFailed:
    """What a connection that could not be made means: a server may yet come up, a wrong certificate stays wrong."""
    text = _words(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate" in text.lower():
        return ExchangeFailed(f"{text}; look at ssl_ca_certs in the URL", sent=False, final=True)
    hint = "is a server running there? `agentperf up` starts one on this machine"
    return ExchangeFailed(f"{text}; {hint}", sent=False, silent=isinstance(error, RedisTimeoutError))


def _refused(error: ResponseError) -> ExchangeFailed:
    """What a refused handshake means: most refusals are for good, a few pass."""
    text = str(error)
    passing = text.startswith(("LOADING", "ERR max number of clients", "MASTERDOWN"))
    hint = "" if passing else "; look at user name, password and database in the URL"
    return ExchangeFailed(text + hint, sent=False, final=not passing)


class AsyncExecutor:
    """Runs flows on one asyncio loop. Commands issued in the same tick travel as one pipeline.

    Args:
        connector: makes the connections.
        topology: knows which node serves which key.
        deadline_s: seconds that one command may take in all.
        on_trouble: called after an exchange failed.
    """

    def __init__(
        self, connector: Connector, topology: Topology, deadline_s: float, on_trouble: Callable[[], None]
    ) -> None:
        self._connector = connector
        self._topology = topology
        self._deadline_s = deadline_s
        self._on_trouble = on_trouble
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._idle: dict[Node, deque[AsyncConnection]] = {}
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._gathered: list[tuple[Command[Any], asyncio.Future[Any]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._lifeline: AsyncGenerator[None, None] | None = None

    async def run(self, flow: Runnable[T]) -> T:
        """Run a flow to its end and return what it returns.

        A cancelled task throws the cancellation into the flow; what the flow still does then, such as giving a lease
        back, is done in a task of its own that a second cancellation does not reach.

        Raises:
            AgentPerfError: what the flow lets pass.
        """
        if isinstance(flow, Command):
            return cast("T", await self._submit(flow))
        if isinstance(flow, Batch):
            flow = cast("Flow[T]", iter(flow))
        try:
            step = next(flow)
            while True:
                try:
                    answer = await self._perform(step)
                except asyncio.CancelledError as error:
                    step = flow.throw(error)
                    return await asyncio.shield(self._spawn(self._rest_of(flow, step)))
                except BaseException as error:  # noqa: BLE001  the flow decides
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    async def _rest_of(self, flow: Flow[T], step: Step) -> T:
        try:
            while True:
                try:
                    answer = await self._perform(step)
                except BaseException as error:  # noqa: BLE001  the flow decides
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    def close_now(self) -> None:
        """Close the sockets without the loop's help, for when it is gone or about to go."""
        self._closed = True
        for stack in self._idle.values():
            while stack:
                _drop(stack.pop())

    async def aclose(self) -> None:
        """Finish what is under way, then close the connections."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
        self._closed = True
        for stack in self._idle.values():
            while stack:
                with contextlib.suppress(RedisError, OSError):
                    await stack.pop().disconnect()
        if self._lifeline is not None:
            lifeline, self._lifeline = self._lifeline, None
            await lifeline.aclose()

    async def start(self) -> None:
        """Have `asyncio.run` close the connections at its end: it closes what asynchronous generators are left."""
        self._lifeline = self._live()
        await anext(self._lifeline)

    async def _live(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.close_now()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    async def _perform(self, step: Step) -> Any:
        if isinstance(step, Command):
            return await self._submit(step)
        if isinstance(step, Batch):
            return await asyncio.shield(self._spawn(self._deliver(step.commands)))
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await _await_hint(step.hint, step.seconds)

    def _submit(self, command: Command[Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self._gathered:
            self._loop.call_soon(self._send_gathered)
        self._gathered.append((command, future))
        return future

    def _send_gathered(self) -> None:
        """Send what this tick has gathered: one pipeline a node, so that nodes do not wait for each other."""
        gathered, self._gathered = self._gathered, []
        by_node: dict[Node | None, list[tuple[Command[Any], asyncio.Future[Any]]]] = {}
        for command, future in gathered:
            if not future.cancelled():  # not sent yet: a cancelled one never will be
                node = self._topology.node_for(command.keys[0] if command.keys else None)
                by_node.setdefault(node, []).append((command, future))
        for group in by_node.values():
            self._spawn(self._serve(group))

    async def _serve(self, group: list[tuple[Command[Any], asyncio.Future[Any]]]) -> None:
        try:
            results = await self._deliver([command for command, _ in group])
        except BaseException as error:
            for _, future in group:
                if not future.done():
                    future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, AgentPerfError):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def _deliver(self, commands: Sequence[Command[Any]]) -> list[Any]:
        if not commands:
            return []
        delivery: Delivery = deliver(commands, self._topology, self._deadline_s)
        try:
            step = next(delivery)
            while True:
                if isinstance(step, Rest):
                    await asyncio.sleep(step.seconds)
                    step = delivery.send(None)
                    continue
                try:
                    replies = await self._exchange(step)
                except ExchangeFailed as failed:
                    self._on_trouble()
                    step = delivery.throw(failed)
                else:
                    step = delivery.send(replies)
        except StopIteration as done:
            return cast("list[Any]", done.value)

    async def _exchange(self, step: Exchange) -> list[Reply]:
        sent = fresh = False
        connection: AsyncConnection | None = None
        stack = self._idle.setdefault(step.node, deque())
        try:
            async with asyncio.timeout(step.timeout_s), self._places:
                if stack:
                    connection = stack.pop()
                else:
                    fresh = True
                    connection = await self._connector.async_connection(step.node)
                    await connection.connect()
                sent = True
                await connection.send_packed_command((step.payload,), check_health=False)
                replies = [await _aread(connection) for _ in range(step.count)]
        except ResponseError as error:
            _drop(connection)
            raise _refused(error) from None
        except TimeoutError:
            _drop(connection)
            raise ExchangeFailed(f"no answer for {step.timeout_s:.3g} s", sent=sent, silent=True) from None
        except (RedisError, OSError) as error:
            _drop(connection)
            if not fresh:
                while stack:
                    _drop(stack.pop())
            if not sent:
                raise _unconnected(error) from None
            raise ExchangeFailed(_words(error), sent=True, stale=not fresh) from None
        except BackendUnavailable as error:
            raise ExchangeFailed(error.reason, sent=False, final=True) from None
        except BaseException:
            _drop(connection)
            raise
        if self._closed:
            _drop(connection)
        else:
            stack.append(connection)
        return replies


async def _aread(connection: AsyncConnection) -> Reply:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return ServerError(str(error))


def _drop(connection: AsyncConnection | None) -> None:
    """Close a connection at once, on any thread and with or without its loop."""
    if connection is None:
        return
    writer = connection._writer  # noqa: SLF001  redis-py offers no close that neither waits nor needs a running loop
    connection._reader = connection._writer = None  # noqa: SLF001
    if writer is not None:
        try:
            writer.close()
        except RuntimeError:  # the loop is closed already: close the socket below it
            sock = writer.get_extra_info("socket")
            if sock is not None:
                os.close(sock.detach()) if hasattr(sock, "detach") else None


async def _await_hint(hint: Hint, seconds: float) -> bool:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    def given() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(wake)

    hint.call_when_given(given)
    try:
        await asyncio.wait_for(future, seconds)
    except TimeoutError:
        return False
    finally:
        hint.forget(given)
    return True


__all__ = ["AsyncExecutor", "Connector", "Executor", "Runnable"]
