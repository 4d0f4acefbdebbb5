"""The asyncio driver of flows."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

from redis.asyncio.connection import Connection as AsyncConnection

from agentperf_redis.command import Batch, Call, Command, Flow, Pause, Reply, Shielded, Step, Together, Wait, WakeUp
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.transport.breaker import Breaker
from agentperf_redis.transport.connector import Connector, aconnect, aread, asend, drop
from agentperf_redis.transport.delivery import Backoff, Exchange, ExchangeFailed, Settle, deliver, deliver_opened
from agentperf_redis.transport.exchange import BUSY, MAX_CONNECTIONS, Connections, ExchangeFlow, Open, Talk
from agentperf_redis.transport.executor import Runnable
from agentperf_redis.transport.handshake import Handshake
from agentperf_redis.transport.topology import Node, Topology

T = TypeVar("T")


class AsyncExecutor:
    """Runs flows on one asyncio loop. Commands for one node that start in the same loop tick are sent as one pipeline.

    Args:
        connector: creates the connections.
        topology: maps keys to nodes.
        breaker: knows the nodes that do not answer.
        deadline_s: total seconds that one command may take.
        handshake: sent first on a new connection.
        on_end: called when the loop ends or the executor is closed.
    """

    # The executor has no reference to its loop. With a reference, both would stay forever in the backend's map of
    # loops, whose keys are weak references to the loops.

    def __init__(
        self,
        connector: Connector,
        topology: Topology,
        breaker: Breaker,
        deadline_s: float,
        handshake: Handshake,
        on_end: Callable[[], None],
    ) -> None:
        self._connector = connector
        self._topology = topology
        self._breaker = breaker
        self._deadline_s = deadline_s
        self._on_end = on_end
        self._connections = Connections[AsyncConnection](connector, handshake, drop)
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._gathered: list[tuple[Command[Any], float, asyncio.Future[Any]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening = handshake.opening if topology.scattered else None
        self._lifeline: AsyncGenerator[None, None] | None = None

    async def run(self, flow: Runnable[T], deadline_s: float | None = None) -> T:
        """Run a flow to its end and return its result.

        If the task is cancelled, CancelledError is raised in the flow. The remaining steps of the flow, such as the
        release of a lease, run in a separate task, so that a second cancellation does not stop them.

        Args:
            flow: a command, a batch or a flow.
            deadline_s: seconds for each of its commands; None uses the deadline of the executor.

        Raises:
            AgentPerfError: an error of a command that the flow does not catch.
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
                    return await self._shielded(flow, step, limit, error)
                except BaseException as error:  # noqa: BLE001  the flow may catch it
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    async def _shielded(
        self, flow: Flow[T], step: Step, deadline_s: float, cause: asyncio.CancelledError | None = None
    ) -> T:
        """Run the remaining steps of a flow in a separate task. If the flow does not catch `cause`, raise `cause`."""
        try:
            return await asyncio.shield(self._spawn(self._rest_of(flow, step, deadline_s)))
        except asyncio.CancelledError:
            if cause is not None:  # `asyncio.shield` raises a new error, without the message and frames of `cause`
                raise cause from None
            raise

    async def _rest_of(self, flow: Flow[T], step: Step, deadline_s: float) -> T:
        try:
            while True:
                try:
                    answer = await self._perform(step, deadline_s)
                except BaseException as error:  # noqa: BLE001  the flow may catch it
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    def close_now(self) -> None:
        """Close the connections without waiting. Call it on the thread of the loop, or after the loop has ended."""
        self._connections.close()
        self._on_end()

    async def aclose(self) -> None:
        """Wait for the running flows and deliveries, then close the connections."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
        self.close_now()
        if self._lifeline is not None:
            lifeline, self._lifeline = self._lifeline, None
            await lifeline.aclose()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the next tick

    async def start(self) -> None:
        """Open an asynchronous generator, which closes the connections when `asyncio.run` closes the generator."""
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
        self._tasks.add(task)  # the loop has only weak references to tasks
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
        if isinstance(step, Wait):
            return await _await_wake_up(step.wake_up, step.seconds)
        if isinstance(step, Call):
            result = step.function()
            return await result if inspect.isawaitable(result) else result
        if isinstance(step, Shielded):
            try:
                # Start the flow here: a new task may be cancelled before it starts the flow. Then no `finally` of the
                # flow would run.
                first = next(step.flow)
            except StopIteration as done:
                return done.value
            return await self._shielded(step.flow, first, deadline_s)
        return await self._run_together(step, deadline_s)

    async def _run_together(self, step: Together, deadline_s: float) -> None:
        tasks = [asyncio.create_task(self.run(flow, deadline_s), name=step.name) for flow in step.flows]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _submit(self, command: Command[Any], deadline_s: float) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._gathered:
            loop.call_soon(self._send_gathered)
        self._gathered.append((command, deadline_s, future))
        return future

    def _send_gathered(self) -> None:
        """Send the commands of this tick, one pipeline per node, so that no node delays commands for another node."""
        gathered, self._gathered = self._gathered, []
        groups: dict[tuple[Node | None, float], list[tuple[Command[Any], asyncio.Future[Any]]]] = {}
        for command, deadline_s, future in gathered:
            if not future.cancelled():  # skips a command that was cancelled before it was sent
                node = self._topology.node_for(command.keys[0] if command.keys else None)
                groups.setdefault((node, deadline_s), []).append((command, future))
        for (_, deadline_s), group in groups.items():
            self._spawn(self._deliver_group(group, deadline_s))

    async def _deliver_group(self, group: list[tuple[Command[Any], asyncio.Future[Any]]], deadline_s: float) -> None:
        """Deliver a group of commands. Each caller gets its result as soon as the reply arrives."""
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
            await self._deliver([command for command, _ in group], deadline_s, settle)
        except BaseException as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            if not isinstance(error, Exception):
                raise

    async def _deliver(self, commands: Sequence[Command[Any]], deadline_s: float, settle: Settle) -> None:
        opening = self._opening
        if opening is None:
            delivery = deliver(commands, self._topology, deadline_s, settle, self._breaker)
        else:
            delivery = deliver_opened(
                opening(), commands, self._topology, deadline_s, settle, self._breaker, self._note_opened
            )
        try:
            step = next(delivery)
            while True:
                if isinstance(step, Backoff):
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

    def _note_opened(self) -> None:
        self._opening = None

    async def _exchange(self, step: Exchange) -> list[Reply]:
        end = asyncio.get_running_loop().time() + step.timeout_s
        if self._places.locked():
            try:
                async with asyncio.timeout_at(end):
                    await self._places.acquire()
            except TimeoutError:
                raise ExchangeFailed(BUSY, sent=False, local=True) from None
        else:
            await self._places.acquire()
        try:
            return await self._carry(self._connections.exchange(step), end)
        finally:
            self._places.release()

    async def _carry(self, exchange: ExchangeFlow[AsyncConnection], end: float) -> list[Reply]:
        try:
            step = next(exchange)
            while True:
                connection = None
                try:
                    async with asyncio.timeout_at(end):
                        if isinstance(step, Talk):
                            await asend(step.connection, step.payload)
                            for _ in range(step.count):
                                step.replies.append(await aread(step.connection))
                        elif isinstance(step, Open):
                            connection = await self._connector.async_connection(step.node)
                        else:
                            await aconnect(step.connection)
                except BaseException as error:  # noqa: BLE001  the exchange interprets the error
                    step = exchange.throw(error)
                else:
                    step = exchange.send(connection)
        except StopIteration as done:
            replies: list[Reply] = done.value
            return replies


async def _await_wake_up(wake_up: WakeUp, seconds: float) -> bool:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    def sent() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(wake)

    wake_up.call_when_sent(sent)
    try:
        await asyncio.wait_for(future, seconds)
    except TimeoutError:
        return False
    finally:
        wake_up.forget(sent)
    return True
