"""The two drivers: they do what flows describe, one blocking, one on an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from redis.asyncio.connection import Connection as AsyncConnection
from redis.connection import Connection
from redis.exceptions import RedisError, ResponseError

from agentperf_redis.breaker import Breaker
from agentperf_redis.command import Batch, Command, Flow, Hint, Pause, Reply, Step, Wait, running_loop
from agentperf_redis.connector import Connector, aread, broken, drop, read, refused, send, unconnected
from agentperf_redis.delivery import Exchange, ExchangeFailed, Rest, Settle, deliver
from agentperf_redis.errors import AgentPerfError, BackendUnavailable
from agentperf_redis.greeting import REPLIES, Greeting
from agentperf_redis.topology import Node, Topology

T = TypeVar("T")

Runnable = Command[T] | Batch[T] | Flow[T]

CLOSED = "this client was closed"
MAX_CONNECTIONS = 32
"""Exchanges under way at once per driver and process; the usual maxclients of 10,000 then serves 300 processes."""
BUSY = f"all {MAX_CONNECTIONS} connections of this process were busy"


class Executor:
    """Runs flows, blocking the calling thread. Safe to share between threads.

    Args:
        connector: makes the connections.
        topology: knows which node serves which key.
        breaker: knows which nodes are not worth asking; None asks all.
        deadline_s: seconds that one command may take in all.
        greeting: what is said first on a connection; None says nothing.
    """

    def __init__(
        self,
        connector: Connector,
        topology: Topology,
        breaker: Breaker | None,
        deadline_s: float,
        greeting: Greeting | None,
    ) -> None:
        self._connector = connector
        self._topology = topology
        self._breaker = breaker
        self._deadline_s = deadline_s
        self._greeting = greeting
        self._idle: dict[Node, deque[Connection]] = {}
        self._greeted: dict[Node, set[Connection]] = {}
        """Connections that are up, idle or in use, and whose server was looked at."""
        # A queue of tokens and no semaphore: that is Python code, and an interrupt between two of its steps (Ctrl-C)
        # would leave its lock held, and every thread waiting for ever.
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(MAX_CONNECTIONS):
            self._places.put(None)
        self._opened = greeting is None or not topology.scattered
        self._closed = False

    def run(self, flow: Runnable[T], deadline_s: float | None = None) -> T:
        """Run a flow to its end and return what it returns.

        Args:
            flow: a command, a batch or a flow.
            deadline_s: seconds for each of its commands; None is the executor's.

        Raises:
            AgentPerfError: what the flow lets pass.
        """
        limit = self._deadline_s if deadline_s is None else deadline_s
        if isinstance(flow, Command):
            return self._perform_command(flow, limit)
        if isinstance(flow, Batch):
            flow = cast("Flow[T]", iter(flow))
        try:
            step = next(flow)
            while True:
                try:
                    answer = self._perform(step, limit)
                except BaseException as error:  # noqa: BLE001  an interrupted flow still gives back what it holds
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    def close(self) -> None:
        """Close idle connections; those in use close as their exchange ends."""
        self._closed = True
        for node in list(self._idle):
            self._drop_idle(node)

    def _perform(self, step: Step, deadline_s: float) -> Any:
        if isinstance(step, Command):
            return self._perform_command(step, deadline_s)
        if isinstance(step, Batch):
            return self._deliver(step.commands, deadline_s)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return _wait(step)

    def _perform_command(self, command: Command[T], deadline_s: float) -> T:
        (result,) = self._deliver((command,), deadline_s)
        if isinstance(result, AgentPerfError):
            raise result
        return cast("T", result)

    def _deliver(self, commands: Sequence[Command[Any]], deadline_s: float) -> list[Any]:
        if not self._opened and self._greeting is not None:
            (refusal,) = self._send((self._greeting.opening(),), deadline_s)
            if isinstance(refusal, AgentPerfError):
                return [refusal] * len(commands)
            self._opened = True
        return self._send(commands, deadline_s)

    def _send(self, commands: Sequence[Command[Any]], deadline_s: float) -> list[Any]:
        results: list[Any] = [None] * len(commands)
        delivery = deliver(commands, self._topology, deadline_s, results.__setitem__, self._breaker)
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
                    step = delivery.throw(failed)
                else:
                    step = delivery.send(replies)
        except StopIteration:
            return results

    def _exchange(self, step: Exchange) -> list[Reply]:
        end = time.monotonic() + step.timeout_s
        if self._closed:
            raise ExchangeFailed(CLOSED, sent=False, final=True, local=True)
        replies: list[Reply] = []
        placed = False
        try:
            try:
                placed = self._places.get(timeout=step.timeout_s) is None
            except Empty:
                raise ExchangeFailed(BUSY, sent=False, local=True) from None
            stack = self._idle.get(step.node)
            if stack is None:
                stack = self._idle.setdefault(step.node, deque())
            fresh = False
            try:
                connection = stack.pop()
            except IndexError:
                connection = self._connect(step.node, end)
                fresh = True
            try:
                send(connection, step.payload, end)
                for _ in range(step.count):
                    replies.append(read(connection, end))  # noqa: PERF401  those before a failure count
            except (RedisError, OSError) as error:
                self._drop(step.node, connection)
                if not fresh:  # the others were opened to the same server before; they are as dead
                    self._drop_idle(step.node)
                raise broken(error, replies, fresh=fresh) from None
            except BaseException:
                self._drop(step.node, connection)
                raise
            if self._closed:
                self._drop(step.node, connection)
            else:
                stack.append(connection)
            return replies
        finally:
            if placed:
                self._places.put(None)

    def _connect(self, node: Node, end: float) -> Connection:
        try:
            connection = self._connector.connection(node, max(0.001, end - time.monotonic()))
        except BackendUnavailable as error:  # the embedded server could not be started
            raise ExchangeFailed(error.reason, sent=False, final=True) from None
        try:
            connection.connect()
            if self._greeting is not None and not (node.sentinel or self._greeted.get(node)):
                send(connection, self._greeting.words(), end)
                refusal = self._greeting.heard([read(connection, end) for _ in range(REPLIES)])
                if refusal is not None:
                    raise ExchangeFailed(str(refusal), sent=False, final=True, error=refusal)
        except (RedisError, OSError) as error:
            connection.disconnect()
            if isinstance(error, ResponseError):
                raise refused(error) from None
            raise unconnected(error, self._connector.hint, tls=self._connector.address.tls) from None
        except BaseException:
            connection.disconnect()
            raise
        self._greeted.setdefault(node, set()).add(connection)
        return connection

    def _drop(self, node: Node, connection: Connection) -> None:
        self._greeted.get(node, set()).discard(connection)
        connection.disconnect()

    def _drop_idle(self, node: Node) -> None:
        stack = self._idle.get(node)
        while stack:
            with contextlib.suppress(IndexError):  # another thread took the last one
                self._drop(node, stack.pop())


def _wait(step: Wait) -> bool:
    if step.hint.giver is not None and step.hint.giver is running_loop():
        return False  # it stands still for as long as this thread waits
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
        breaker: knows which nodes are not worth asking.
        deadline_s: seconds that one command may take in all.
        greeting: what is said first on a connection.
        on_end: called when the loop ends, or this was closed.
    """

    # It holds no reference to its loop, which would keep both alive for ever in the backend's map of loops.

    def __init__(
        self,
        connector: Connector,
        topology: Topology,
        breaker: Breaker,
        deadline_s: float,
        greeting: Greeting,
        on_end: Callable[[], None],
    ) -> None:
        self._connector = connector
        self._topology = topology
        self._breaker = breaker
        self._deadline_s = deadline_s
        self._greeting = greeting
        self._on_end = on_end
        self._idle: dict[Node, deque[AsyncConnection]] = {}
        self._greeted: dict[Node, set[AsyncConnection]] = {}
        """Connections that are up, idle or in use, and whose server was looked at."""
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._gathered: list[tuple[Command[Any], float, asyncio.Future[Any]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opened = not topology.scattered
        self._closed = False
        self._lifeline: AsyncGenerator[None, None] | None = None

    async def run(self, flow: Runnable[T], deadline_s: float | None = None) -> T:
        """Run a flow to its end and return what it returns.

        A cancelled task throws the cancellation into the flow; what the flow still does then, such as giving a lease
        back, is done in a task of its own that a second cancellation does not reach.

        Args:
            flow: a command, a batch or a flow.
            deadline_s: seconds for each of its commands; None is the executor's.

        Raises:
            AgentPerfError: what the flow lets pass.
        """
        limit = self._deadline_s if deadline_s is None else deadline_s
        if isinstance(flow, Command):
            return cast("T", await self._submit(flow, limit))
        if isinstance(flow, Batch):
            flow = cast("Flow[T]", iter(flow))
        try:
            step = next(flow)
            while True:
                try:
                    answer = await self._perform(step, limit)
                except asyncio.CancelledError as error:
                    step = flow.throw(error)
                    return await asyncio.shield(self._spawn(self._rest_of(flow, step, limit)))
                except BaseException as error:  # noqa: BLE001  the flow decides
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    async def _rest_of(self, flow: Flow[T], step: Step, deadline_s: float) -> T:
        try:
            while True:
                try:
                    answer = await self._perform(step, deadline_s)
                except BaseException as error:  # noqa: BLE001  the flow decides
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    def close_now(self) -> None:
        """Close the connections without waiting. On the loop's thread, or when the loop has ended."""
        self._closed = True
        for node in self._idle:
            self._drop_idle(node)
        self._on_end()

    async def aclose(self) -> None:
        """Finish what is under way, then close the connections."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
        self.close_now()
        if self._lifeline is not None:
            lifeline, self._lifeline = self._lifeline, None
            await lifeline.aclose()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next round

    async def start(self) -> None:
        """Have `asyncio.run` close the connections at its end: it closes what asynchronous generators are left."""
        self._lifeline = self._live()
        await anext(self._lifeline)

    async def _live(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.close_now()
            await asyncio.sleep(0)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    async def _perform(self, step: Step, deadline_s: float) -> Any:
        if isinstance(step, Command):
            return await self._submit(step, deadline_s)
        if isinstance(step, Batch):
            futures = [self._submit(command, deadline_s) for command in step.commands]
            return await asyncio.gather(*futures, return_exceptions=True)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await _await_hint(step.hint, step.seconds)

    def _submit(self, command: Command[Any], deadline_s: float) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._gathered:
            loop.call_soon(self._send_gathered)
        self._gathered.append((command, deadline_s, future))
        return future

    def _send_gathered(self) -> None:
        """Send what this tick has gathered: one pipeline a node, so that nodes do not wait for each other."""
        gathered, self._gathered = self._gathered, []
        groups: dict[tuple[Node | None, float], list[tuple[Command[Any], asyncio.Future[Any]]]] = {}
        for command, deadline_s, future in gathered:
            if not future.cancelled():  # not sent yet: a cancelled one never will be
                node = self._topology.node_for(command.keys[0] if command.keys else None)
                groups.setdefault((node, deadline_s), []).append((command, future))
        for (_, deadline_s), group in groups.items():
            self._spawn(self._serve(group, deadline_s))

    async def _serve(self, group: list[tuple[Command[Any], asyncio.Future[Any]]], deadline_s: float) -> None:
        """Deliver a group; each caller has its answer as soon as it is there."""
        futures = [future for _, future in group]

        def settle(index: int, result: Any) -> None:
            future = futures[index]
            if future.done():
                return
            if isinstance(result, AgentPerfError):
                future.set_exception(result)
            else:
                future.set_result(result)

        try:
            if not self._opened:
                opening: list[Any] = [None]
                await self._deliver([self._greeting.opening()], deadline_s, opening.__setitem__)
                if isinstance(opening[0], AgentPerfError):
                    for index in range(len(futures)):
                        settle(index, opening[0])
                    return
                self._opened = True
            await self._deliver([command for command, _ in group], deadline_s, settle)
        except BaseException as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            if not isinstance(error, Exception):
                raise

    async def _deliver(self, commands: Sequence[Command[Any]], deadline_s: float, settle: Settle) -> None:
        delivery = deliver(commands, self._topology, deadline_s, settle, self._breaker)
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
                    step = delivery.throw(failed)
                else:
                    step = delivery.send(replies)
        except StopIteration:
            return

    async def _exchange(self, step: Exchange) -> list[Reply]:
        if self._closed:
            raise ExchangeFailed(CLOSED, sent=False, final=True, local=True)
        placed = sent = fresh = False
        replies: list[Reply] = []
        connection: AsyncConnection | None = None
        stack = self._idle.setdefault(step.node, deque())
        try:
            async with asyncio.timeout(step.timeout_s), self._places:
                placed = True
                if stack:
                    connection = stack.pop()
                else:
                    fresh = True
                    connection = await self._connector.async_connection(step.node)
                    await self._connect(step.node, connection)
                sent = True
                await connection.send_packed_command((step.payload,), check_health=False)
                for _ in range(step.count):
                    replies.append(await aread(connection))  # noqa: PERF401  those before a failure count
        except ResponseError as error:
            self._drop(step.node, connection)
            raise refused(error) from None
        except TimeoutError:
            self._drop(step.node, connection)
            if not placed:
                raise ExchangeFailed(BUSY, sent=False, local=True) from None
            reason = f"no answer for {step.timeout_s:.3g} s"
            raise ExchangeFailed(reason, sent=sent, silent=True, replies=replies) from None
        except (RedisError, OSError) as error:
            self._drop(step.node, connection)
            if not fresh:
                self._drop_idle(step.node)
            if sent:
                raise broken(error, replies, fresh=fresh) from None
            raise unconnected(error, self._connector.hint, tls=self._connector.address.tls) from None
        except BackendUnavailable as error:
            raise ExchangeFailed(error.reason, sent=False, final=True) from None
        except BaseException:
            self._drop(step.node, connection)
            raise
        if self._closed:
            self._drop(step.node, connection)
        else:
            stack.append(connection)
        return replies

    async def _connect(self, node: Node, connection: AsyncConnection) -> None:
        await connection.connect()
        if not (node.sentinel or self._greeted.get(node)):
            await connection.send_packed_command((self._greeting.words(),), check_health=False)
            refusal = self._greeting.heard([await aread(connection) for _ in range(REPLIES)])
            if refusal is not None:
                raise ExchangeFailed(str(refusal), sent=False, final=True, error=refusal)
        self._greeted.setdefault(node, set()).add(connection)

    def _drop(self, node: Node, connection: AsyncConnection | None) -> None:
        if connection is not None:
            self._greeted.get(node, set()).discard(connection)
            drop(connection)

    def _drop_idle(self, node: Node) -> None:
        stack = self._idle.get(node)
        while stack:
            self._drop(node, stack.pop())


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
