"""The asyncio driver of flows.

An event loop may end in the middle of a flow: `loop.close()` cancels no task, and `asyncio.run` does not wait for tasks
that begin while it ends. No task of a closed loop ever continues. A flow that holds something, such as a lease, would
hold it forever. Therefore the end of a loop counts as a cancellation of its flows. The blocking driver runs the
remaining steps of these flows on a background thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar, cast

from redis.asyncio.connection import Connection as AsyncConnection

from agentperf_redis.command import Batch, Call, Command, Flow, Pause, Reply, Shielded, Step, Together, Wait, WakeUp
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.transport.breaker import Breaker
from agentperf_redis.transport.connector import Connector, aconnect, aread, asend, drop
from agentperf_redis.transport.delivery import Backoff, Exchange, ExchangeFailed, Settle, deliver, deliver_opened
from agentperf_redis.transport.exchange import BUSY, MAX_CONNECTIONS, Connections, ExchangeFlow, Open, Talk
from agentperf_redis.transport.executor import Executor, Runnable
from agentperf_redis.transport.handshake import Handshake
from agentperf_redis.transport.topology import Node, Topology

T = TypeVar("T")

_NEVER_S: Final = 10.0**9
_RESUMABLE = (Command, Batch, Pause, Wait)
"""Steps that the blocking driver may repeat after the end of a loop. Every command may be delivered twice."""


class _LoopEnd:
    """Notices the end of an event loop. Only a timer of the loop refers to this object; a closed loop drops its timers.

    Args:
        ended: called when the loop has ended. The call may happen at any point of any thread, since the garbage
            collector may be the caller.
    """

    __slots__ = ("_ended",)

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def __call__(self) -> None:
        """Do nothing: the timer is due in thirty years."""

    def __del__(self) -> None:
        self._ended()


class AsyncExecutor:
    """Runs flows on one asyncio loop. Commands of one loop tick for the same node are sent as one pipeline.

    Args:
        connector: creates the connections.
        topology: maps keys to nodes.
        breaker: knows the nodes that do not answer.
        deadline_s: total seconds that one command may take.
        handshake: sent first on a new connection.
        on_end: called when the loop ends or the executor is closed.
        blocking: driver that runs the remaining steps of the flows that the end of the loop has interrupted.
        put: puts a job on the background thread that runs these steps; returns False if no thread can start.
    """

    # The executor has no strong reference to its loop. The backend keeps its executors in a map whose keys are weak
    # references to the loops. If an executor had a strong reference to its loop, the map would keep the executor and
    # the loop forever.

    def __init__(
        self,
        connector: Connector,
        topology: Topology,
        breaker: Breaker,
        deadline_s: float,
        handshake: Handshake,
        on_end: Callable[[], None],
        blocking: Executor,
        put: Callable[[Callable[[], object]], bool],
    ) -> None:
        self._connector = connector
        self._topology = topology
        self._breaker = breaker
        self._deadline_s = deadline_s
        self._on_end = on_end
        self._blocking = blocking
        self._put = put
        self._pid = os.getpid()
        self._connections = Connections[AsyncConnection](connector, handshake, drop)
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._gathered: list[tuple[Command[Any], float, asyncio.Future[Any]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening = handshake.opening if topology.scattered else None
        self._lifeline: AsyncGenerator[None, None] | None = None
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        self._end_timer: weakref.ref[asyncio.TimerHandle] | None = None  # weak, because a timer refers to its loop
        self._running: dict[Flow[Any], tuple[Step, float]] = {}
        """Each flow in progress -> its present step, and the deadline of the commands of this step."""
        self._must_end: dict[Flow[Any], tuple[Step, float]] = {}
        """The same for flows that are shielded from cancellation."""
        self._on_loop_end: dict[object, Callable[[], object]] = {}

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
                self._running[flow] = step, limit
                try:
                    answer = await self._perform(step, limit)
                except asyncio.CancelledError as error:
                    step = flow.throw(error)
                    return await self._shielded(flow, step, limit, error)
                except GeneratorExit:
                    self._cut_off(self._running, flow, must_end=False)
                    raise
                except BaseException as error:  # noqa: BLE001  the flow may catch it
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)
        finally:
            if self._pid == os.getpid():  # a forked child keeps the entry, so that its copy of the flow stays open
                self._running.pop(flow, None)

    async def _shielded(
        self, flow: Flow[T], step: Step, deadline_s: float, cause: asyncio.CancelledError | None = None
    ) -> T:
        """Run the remaining steps of a flow in a separate task. If the flow does not catch `cause`, raise `cause`."""
        self._running.pop(flow, None)
        self._must_end[flow] = step, deadline_s  # set here, because the loop may end before the task starts
        try:
            return await asyncio.shield(self._spawn(self._rest_of(flow, step, deadline_s)))
        except asyncio.CancelledError:
            if cause is not None:  # `asyncio.shield` raises a new error, without the message and frames of `cause`
                raise cause from None
            raise

    async def _rest_of(self, flow: Flow[T], step: Step, deadline_s: float) -> T:
        try:
            while True:
                self._must_end[flow] = step, deadline_s
                try:
                    answer = await self._perform(step, deadline_s)
                except (asyncio.CancelledError, GeneratorExit) as error:  # raised only when the event loop ends
                    if isinstance(error, GeneratorExit) or isinstance(step, _RESUMABLE):
                        self._cut_off(self._must_end, flow, must_end=True)
                        raise
                    step = flow.throw(error)
                except BaseException as error:  # noqa: BLE001  the flow may catch it
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)
        finally:
            if self._pid == os.getpid():
                self._must_end.pop(flow, None)

    def call_at_loop_end(self, key: object, callback: Callable[[], object]) -> None:
        """Call `callback` on a background thread if the loop ends before `forget_loop_end(key)` is called."""
        self._on_loop_end[key] = callback

    def forget_loop_end(self, key: object) -> None:
        """Remove a callback of `call_at_loop_end`."""
        self._on_loop_end.pop(key, None)

    def _cut_off(self, flows: dict[Flow[Any], tuple[Step, float]], flow: Flow[Any], *, must_end: bool) -> None:
        """Finish one flow on the background thread, because its task ends with its loop.

        The caller is often the garbage collector, when it closes the coroutine. Therefore this method takes no lock and
        runs no step of the flow.
        """
        place = flows.pop(flow, None) if self._pid == os.getpid() else None
        if place is not None and not self._put(lambda: self._finish(flow, *place, must_end=must_end)):
            flow.close()  # the interpreter is shutting down

    def _note_loop_end(self) -> None:
        """Finish the work that the end of the loop has interrupted. `_LoopEnd` calls this, so it must take no lock."""
        loop = None if self._loop is None else self._loop()
        if (loop is not None and not loop.is_closed()) or self._pid != os.getpid():
            return
        if self._interrupted() or not self._connections.closed:
            self._put(self.finish)

    def _interrupted(self) -> bool:
        """Whether something would be interrupted if the loop ended now."""
        return bool(self._running or self._must_end or self._on_loop_end)

    def finish(self) -> None:
        """After the end of the loop: close the connections, and let the background thread finish the interrupted work.

        Shielded flows continue. In the other flows, the end of the loop counts as a cancellation. Each flow is a
        separate job, so that an error in one does not stop the others.
        """
        if self._pid != os.getpid():
            return
        self.close_now()
        for flows, must_end in ((self._must_end, True), (self._running, False)):
            for flow in list(flows):
                self._cut_off(flows, flow, must_end=must_end)
        for key in list(self._on_loop_end):
            callback = self._on_loop_end.pop(key, None)
            if callback is not None:
                self._put(callback)
        # Close the coroutine of each task, so that its connections close now. The task stays pending, and asyncio must
        # not warn about this.
        for task in list(self._tasks):
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001  as asyncio.gather does
            with contextlib.suppress(Exception):  # redis-py and asyncio may raise, since the loop is closed
                task.get_coro().close()

    def _finish(self, flow: Flow[Any], step: Step, deadline_s: float, *, must_end: bool) -> None:
        # The caller is gone, so the result of the flow is dropped. A ValueError means that the flow is being closed at
        # this moment.
        with contextlib.suppress(asyncio.CancelledError, AgentPerfError, StopIteration, ValueError):
            if not (must_end and isinstance(step, _RESUMABLE)):
                step = flow.throw(asyncio.CancelledError("the event loop has ended"))
            self._blocking.resume(flow, step, deadline_s)

    def close_now(self) -> None:
        """Close the connections without waiting. Call it on the thread of the loop, or after the loop has ended."""
        self._connections.close()
        self._on_end()
        timer = None if self._end_timer is None else self._end_timer()
        if timer is not None and not self._interrupted():
            timer.cancel()  # otherwise each closed client would leave a timer in a loop that continues

    async def aclose(self) -> None:
        """Wait for the running flows and deliveries, then close the connections."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
        self.close_now()
        if self._lifeline is not None:
            lifeline, self._lifeline = self._lifeline, None
            await lifeline.aclose()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the next tick of the loop

    async def start(self) -> None:
        """Prepare for the end of the loop.

        This method opens an asynchronous generator and starts a timer. `asyncio.run` closes the generator before it
        closes the loop, and the generator then closes the connections. `loop.close()` alone closes no generator, but
        drops the timers of the loop: when this timer is dropped, `_LoopEnd` reports the end of the loop.
        """
        loop = asyncio.get_running_loop()
        self._loop = weakref.ref(loop)
        self._end_timer = weakref.ref(loop.call_later(_NEVER_S, _LoopEnd(self._note_loop_end)))
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
                # Start the flow here, not in the new task. If the task were cancelled before its first step, no
                # `finally` of the flow would run.
                first = next(step.flow)
            except StopIteration as done:
                return done.value
            return await self._shielded(step.flow, first, deadline_s)
        return await self._run_together(step, deadline_s)

    async def _run_together(self, step: Together, deadline_s: float) -> None:
        tasks = [asyncio.create_task(self.run(flow, deadline_s), name=step.name) for flow in step.flows]
        try:
            await asyncio.gather(*tasks)
        except GeneratorExit:  # the loop has ended: the tasks cannot be cancelled any more
            raise
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

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
            if not future.cancelled():  # a cancelled command is not sent
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
        except GeneratorExit:  # the loop has ended: no callback of the futures can run
            raise
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
    woken: asyncio.Future[bool] = loop.create_future()

    def end(is_woken: bool) -> None:
        if not woken.done():
            woken.set_result(is_woken)

    def sent() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end, True)

    # `asyncio.wait_for` is not used: if a result and a cancellation come at once, `wait_for` of Python 3.11 returns the
    # result and drops the cancellation. `asyncio.timeout` is not used, because it costs more than this timer.
    timer = loop.call_later(seconds, end, False)
    wake_up.call_when_sent(sent)
    try:
        return await woken
    finally:
        timer.cancel()
        wake_up.forget(sent)
