"""The blocking driver of flows."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from _thread import start_new_thread
from collections.abc import Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from redis.connection import Connection

from agentperf_redis.background import starter
from agentperf_redis.command import (
    Batch,
    Call,
    Command,
    Flow,
    Pause,
    Reply,
    Shielded,
    Step,
    Together,
    Wait,
    running_loop,
)
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.transport.breaker import Breaker
from agentperf_redis.transport.connector import Connector, read, send
from agentperf_redis.transport.delivery import (
    Backoff,
    DeliveryFlow,
    DeliveryStep,
    Exchange,
    ExchangeFailed,
    deliver,
    deliver_opened,
)
from agentperf_redis.transport.exchange import BUSY, MAX_CONNECTIONS, Connections, ExchangeFlow, Open, Talk
from agentperf_redis.transport.handshake import Handshake
from agentperf_redis.transport.permits import Permit, Permits
from agentperf_redis.transport.topology import Topology

T = TypeVar("T")

Runnable = Command[T] | Batch[T] | Flow[T]


_LATE_READ_S = 0.05
"""Minimum timeout for reading replies, s. They may have arrived while the driver was waiting for another node."""


class _Sent:
    """The first step of a delivery. If `connection` is set, the request was sent on it, and its replies are unread."""

    __slots__ = ("connection", "end", "error", "permit", "step")

    def __init__(self, step: DeliveryStep) -> None:
        self.step = step
        self.end = 0.0
        self.permit: Permit | None = None
        self.connection: Connection | None = None
        """None if the request must still be sent."""
        self.error: BaseException | None = None


class Executor:
    """Runs flows and blocks the calling thread. Safe to share between threads.

    Args:
        connector: creates the connections.
        topology: maps keys to nodes.
        breaker: knows the nodes that do not answer; None tries all nodes.
        deadline_s: total seconds that one command may take.
        handshake: sent first on a new connection; None sends nothing.
    """

    def __init__(
        self,
        connector: Connector,
        topology: Topology,
        breaker: Breaker | None,
        deadline_s: float,
        handshake: Handshake | None,
    ) -> None:
        self._connector = connector
        self._topology = topology
        self._breaker = breaker
        self._deadline_s = deadline_s
        self._connections = Connections[Connection](connector, handshake, Connection.disconnect)
        self._places = Permits(MAX_CONNECTIONS)
        self._opening = handshake.opening if handshake is not None and topology.scattered else None

    def run(self, flow: Runnable[T], deadline_s: float | None = None) -> T:
        """Run a flow to its end and return its result.

        Args:
            flow: a command, a batch or a flow.
            deadline_s: seconds for each of its commands; None uses the deadline of the executor.

        Raises:
            AgentPerfError: an error of a command that the flow does not catch.
        """
        limit = self._deadline_s if deadline_s is None else deadline_s
        if isinstance(flow, Command):
            return self._perform_command(flow, limit)
        if isinstance(flow, Batch):
            flow = cast("Flow[T]", iter(flow))
        try:
            step = next(flow)
        except StopIteration as done:
            return cast("T", done.value)
        return self.resume(flow, step, limit)

    def resume(self, flow: Flow[T], step: Step, deadline_s: float) -> T:
        """Run a flow from its present step to its end and return its result.

        Args:
            flow: a flow that has begun.
            step: the step that the flow waits for.
            deadline_s: seconds for each of its commands.
        """
        try:
            while True:
                try:
                    answer = self._perform(step, deadline_s)
                except BaseException as error:  # noqa: BLE001  the flow may catch the error, or release a lease
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as done:
            return cast("T", done.value)

    def close(self) -> None:
        """Close idle connections; connections in use close when their exchange ends."""
        self._connections.close()

    def _perform(self, step: Step, deadline_s: float) -> Any:
        if isinstance(step, Command):
            return self._perform_command(step, deadline_s)
        if isinstance(step, Batch):
            return self._deliver(step.commands, deadline_s)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Wait):
            return _wait(step)
        if isinstance(step, Call):
            return step.function()
        if isinstance(step, Shielded):
            return self.run(step.flow, deadline_s)
        return self._run_together(step, deadline_s)

    def _run_together(self, step: Together, deadline_s: float) -> None:
        errors: list[BaseException] = []
        ended: SimpleQueue[None] = SimpleQueue()

        def work(flow: Flow[object]) -> None:
            try:
                self.run(flow, deadline_s)
            except BaseException as error:  # noqa: BLE001  raised on the waiting thread
                errors.append(error)
            finally:
                ended.put(None)

        for flow in step.flows:
            run = partial(contextvars.copy_context().run, work, flow)
            start_new_thread(starter(threading.Thread(target=run, name=step.name, daemon=True), run), ())
        for _ in step.flows:
            ended.get()
        if errors:
            raise errors[0]

    def _perform_command(self, command: Command[T], deadline_s: float) -> T:
        (result,) = self._deliver((command,), deadline_s)
        if isinstance(result, AgentPerfError):
            raise result
        answer: T = result
        return answer

    def _deliver(self, commands: Sequence[Command[Any]], deadline_s: float) -> list[Any]:
        opening = self._opening  # read only once, because another thread may clear it
        if len(commands) > 1 and opening is None and self._topology.scattered:
            parts = self._topology.parts([command.keys for command in commands])
            if len(parts) > 1:
                return self._side_by_side(parts, commands, deadline_s)
        results: list[Any] = [None] * len(commands)
        if opening is None:
            delivery = deliver(commands, self._topology, deadline_s, results.__setitem__, self._breaker)
        else:
            delivery = deliver_opened(
                opening(), commands, self._topology, deadline_s, results.__setitem__, self._breaker, self._note_opened
            )
        self._finish(delivery)
        return results

    def _side_by_side(self, parts: list[list[int]], commands: Sequence[Command[Any]], deadline_s: float) -> list[Any]:
        """Deliver commands to several nodes: send all requests, then read the replies of one node after the other.

        Args:
            parts: for each node, the positions of its commands.
            commands: the commands.
            deadline_s: seconds for all commands together.
        """
        results: list[Any] = [None] * len(commands)

        def begun(part: list[int]) -> tuple[DeliveryFlow, _Sent | None]:
            def settle(index: int, result: Any) -> None:
                results[part[index]] = result

            its = [commands[index] for index in part]
            delivery = deliver(its, self._topology, deadline_s, settle, self._breaker)
            return delivery, self._begin(delivery)

        for delivery, sent in [begun(part) for part in parts]:
            self._finish(delivery, sent)
        return results

    def _begin(self, delivery: DeliveryFlow) -> _Sent | None:
        """Begin the first step of a delivery without waiting for replies. Return None if the delivery has no step."""
        try:
            step = next(delivery)
        except StopIteration:  # the breaker refuses all commands
            return None
        sent = _Sent(step)
        if isinstance(step, Exchange):
            sent.end = time.monotonic() + step.timeout_s
            sent.permit = self._places.acquire(0)
            with contextlib.suppress(ExchangeFailed):  # if the connections are closed, `_finish` gets this error again
                sent.connection = None if sent.permit is None else self._connections.idle(step.node)
            if sent.connection is not None:
                try:
                    send(sent.connection, step.payload, sent.end)
                except Exception as error:  # noqa: BLE001  `_received` handles it
                    sent.error = error
            elif sent.permit is not None:
                self._places.release(sent.permit)
        return sent

    def _finish(self, delivery: DeliveryFlow, sent: _Sent | None = None) -> None:
        """Perform the steps of a delivery. `sent` is its first step, if `_begin` has begun this step."""
        try:
            step = next(delivery) if sent is None else sent.step
            while True:
                if isinstance(step, Backoff):
                    time.sleep(step.seconds)
                    step, sent = delivery.send(None), None
                    continue
                try:
                    if sent is None:
                        replies = self._exchange(step)
                    elif sent.connection is None:  # the request is not sent yet, but its timeout began in `_begin`
                        step.timeout_s = max(_LATE_READ_S, sent.end - time.monotonic())
                        replies = self._exchange(step)
                    else:
                        replies = self._received(step, sent.connection, sent)
                except ExchangeFailed as failed:
                    step, sent = delivery.throw(failed), None
                else:
                    step, sent = delivery.send(replies), None
        except StopIteration:
            return

    def _received(self, request: Exchange, connection: Connection, sent: _Sent) -> list[Reply]:
        """Read the replies of a request that was sent. They may have arrived while those of other nodes were read."""
        end = max(sent.end, time.monotonic() + _LATE_READ_S)
        replies: list[Reply] = []
        try:
            if sent.error is not None:
                raise sent.error
            for _ in range(request.count):
                replies.append(read(connection, end))  # noqa: PERF401  if a read fails, earlier replies are used
        except BaseException as error:
            failure = self._connections.failure(error, request, connection, replies)
            if failure is None:
                raise
            raise failure from None
        finally:
            if sent.permit is not None:
                self._places.release(sent.permit)
        self._connections.keep(request.node, connection)
        return replies

    def _note_opened(self) -> None:
        self._opening = None

    def _exchange(self, request: Exchange) -> list[Reply]:
        end = time.monotonic() + request.timeout_s
        permit = self._places.acquire(request.timeout_s)
        if permit is None:
            raise ExchangeFailed(BUSY, sent=False, local=True)
        try:
            connection = self._connections.idle(request.node)
            if connection is None:
                return self._carry(self._connections.exchange(request), end)
            # The fast path, with the same rules as `Connections.exchange`. A blocking command takes 15 us of CPU time,
            # and the generator `Connections.exchange` would add 0.4 us. The asyncio executor has no fast path: its
            # commands take longer, so the 0.4 us matter less.
            replies: list[Reply] = []
            try:
                send(connection, request.payload, end)
                for _ in range(request.count):
                    replies.append(read(connection, end))  # noqa: PERF401  if a read fails, earlier replies are used
            except BaseException as error:
                failure = self._connections.failure(error, request, connection, replies)
                if failure is None:
                    raise
                raise failure from None
            self._connections.keep(request.node, connection)
            return replies
        finally:
            self._places.release(permit)

    def _carry(self, exchange: ExchangeFlow[Connection], end: float) -> list[Reply]:
        try:
            step = next(exchange)
            while True:
                connection = None
                try:
                    if isinstance(step, Talk):
                        send(step.connection, step.payload, end)
                        for _ in range(step.count):
                            step.replies.append(read(step.connection, end))
                    elif isinstance(step, Open):
                        connection = self._connector.connection(step.node, max(0.001, end - time.monotonic()))
                    else:
                        step.connection.connect()
                except BaseException as error:  # noqa: BLE001  the exchange interprets the error
                    step = exchange.throw(error)
                else:
                    step = exchange.send(connection)
        except StopIteration as done:
            replies: list[Reply] = done.value
            return replies


def _wait(step: Wait) -> bool:
    if step.wake_up.sender is not None and step.wake_up.sender is running_loop():
        return False  # the wake-up comes from a task of this thread's loop, which cannot run while this thread waits
    # Use a queue, not an Event. A signal that interrupts this thread could leave the lock of an Event held. The sender
    # would then block forever.
    sent: SimpleQueue[None] = SimpleQueue()

    def note() -> None:
        sent.put(None)

    step.wake_up.call_when_sent(note)
    try:
        sent.get(timeout=min(max(0.0, step.seconds), threading.TIMEOUT_MAX))
    except Empty:
        return False
    else:
        return True
    finally:
        step.wake_up.forget(note)
