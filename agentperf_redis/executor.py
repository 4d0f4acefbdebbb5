"""The two drivers: they do what flows describe, one blocking, one on an asyncio loop."""

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
from redis.connection import Connection
from redis.exceptions import RedisError, ResponseError

from agentperf_redis.command import Batch, Command, Flow, Hint, Pause, Reply, Step, Wait
from agentperf_redis.connector import Connector, aread, broken, drop, read, refused, send, unconnected
from agentperf_redis.delivery import Delivery, Exchange, ExchangeFailed, Node, Rest, Topology, deliver
from agentperf_redis.errors import AgentPerfError, BackendUnavailable

T = TypeVar("T")

Runnable = Command[T] | Batch[T] | Flow[T]

MAX_CONNECTIONS = 32
"""Exchanges under way at once per driver and process; the usual maxclients of 10,000 then serves 300 processes."""


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
        replies: list[Reply] = []
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
                send(connection, step.payload, end)
                for _ in range(step.count):
                    replies.append(read(connection, end))  # noqa: PERF401  those before a failure count
            except (RedisError, OSError) as error:
                connection.disconnect()
                if not fresh:  # the others were opened to the same server before; they are as dead
                    while stack:
                        with contextlib.suppress(IndexError):
                            stack.pop().disconnect()
                raise broken(error, replies, fresh=fresh) from None
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
        try:
            connection = self._connector.connection(step.node, step.timeout_s)
        except BackendUnavailable as error:  # the embedded server could not be started
            raise ExchangeFailed(error.reason, sent=False, final=True) from None
        try:
            connection.connect()
        except (RedisError, OSError) as error:
            connection.disconnect()
            raise (refused(error) if isinstance(error, ResponseError) else unconnected(error)) from None
        return connection


def _wait(step: Wait) -> bool:
    event = threading.Event()
    step.hint.call_when_given(event.set)
    try:
        return event.wait(step.seconds)
    finally:
        step.hint.forget(event.set)


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
                drop(stack.pop())

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
        replies: list[Reply] = []
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
                for _ in range(step.count):
                    replies.append(await aread(connection))  # noqa: PERF401  those before a failure count
        except ResponseError as error:
            drop(connection)
            raise refused(error) from None
        except TimeoutError:
            drop(connection)
            reason = f"no answer for {step.timeout_s:.3g} s"
            raise ExchangeFailed(reason, sent=sent, silent=True, replies=replies) from None
        except (RedisError, OSError) as error:
            drop(connection)
            if not fresh:
                while stack:
                    drop(stack.pop())
            raise (broken(error, replies, fresh=fresh) if sent else unconnected(error)) from None
        except BackendUnavailable as error:
            raise ExchangeFailed(error.reason, sent=False, final=True) from None
        except BaseException:
            drop(connection)
            raise
        if self._closed:
            drop(connection)
        else:
            stack.append(connection)
        return replies


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
