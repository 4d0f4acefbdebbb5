"""Descriptions of I/O, without I/O.

Every operation on the server is a `Command`, or a `Flow` of several: a generator that yields steps and receives their
results. Two thin drivers (`transport.executor`, `transport.async_executor`) perform the steps, one blocking and one for
asyncio. So each operation is written once, and a test drives a flow with ``send()`` alone.

    def acquire_or_wait(...) -> Flow[Lease]:
        lease = yield from acquire(...)          # a Command: its result has an exact type
        if lease is None:
            yield from Pause(0.05)
        ...
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, cast

from agentperf_redis.errors import AgentPerfError
from agentperf_redis.script import Script

T = TypeVar("T")

Arg: TypeAlias = str | bytes | int
NamedArgs: TypeAlias = Mapping[str, Arg | tuple[Arg, ...]]
"""Arguments of a script, by the names in its header and in the order of the header.

A name that ends in ``...`` has a tuple of values. The order is the wire order. The tests compare every command with
its header, so the order cannot drift between Python and Lua (tests/headers.py).
"""
Reply: TypeAlias = Any
"""A reply of the server: int, bytes, None or a list of these. The decoder of the command checks it."""


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """Run one script, or one plain read command, and decode its reply.

    Attributes:
        script: a Script, or the name of a plain read-only command such as "MGET".
        keys: its keys, all in one hash slot; at least one.
        args: its other arguments: by name for a script, in order for a plain command.
        decode: turns the reply into T; must handle every reply, and raise CorruptState for an unexpected one.
        resend_args: the arguments of a script that change from the second delivery on, by name. They show the script
            that an earlier copy of the request may still be in flight.
    """

    script: Script | str
    keys: tuple[str, ...]
    args: NamedArgs | tuple[Arg, ...]
    decode: Callable[[Reply], T]
    resend_args: Mapping[str, Arg] | None = None

    def __iter__(self) -> Generator[Command[T], T, T]:
        return (yield self)

    def wire_args(self, *, again: bool = False) -> Sequence[Arg]:
        """Return the arguments in wire order.

        Args:
            again: whether the command was sent before.
        """
        args = self.args
        if isinstance(args, tuple):
            return args
        flat: list[Any] = list(({**args, **self.resend_args} if again and self.resend_args else args).values())
        many = 0  # names with any number of values come last: unpacking only those saves 1 us per command
        while many < len(flat) and isinstance(flat[-1 - many], tuple):
            many += 1
        if many:
            flat[-many:] = [value for values in flat[-many:] for value in values]
        return flat


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Run several commands as one pipeline. Not atomic: each command succeeds or fails on its own."""

    commands: tuple[Command[T], ...]

    def __iter__(self) -> Generator[Batch[T], list[T | AgentPerfError], list[T]]:
        """Return all results in order, or raise the first error once all replies are there."""
        results = yield self
        for result in results:
            if isinstance(result, AgentPerfError):
                raise result
        return cast("list[T]", results)

    def settled(self) -> Generator[Batch[T], list[T | AgentPerfError], list[T | AgentPerfError]]:
        """Return the result or the error of each command."""
        return (yield self)


@dataclass(frozen=True, slots=True)
class Pause:
    """Sleep for `seconds`."""

    seconds: float

    def __iter__(self) -> Generator[Pause, None, None]:
        yield self


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a wake-up, at most `seconds`. Returns whether it came."""

    wake_up: WakeUp
    seconds: float

    def __iter__(self) -> Generator[Wait, bool, bool]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """Call user code and return its result. Under asyncio, an awaitable result is awaited.

    Exceptions of the function are raised in the flow, and so is a cancellation of the task while the function runs.
    The flow must `yield` this itself: a StopIteration of the function does not pass through a `yield from`.
    """

    function: Callable[[], T | Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Shielded(Generic[T]):
    """Run a flow to its end, even if the waiting task is cancelled meanwhile. Returns the result of the flow.

    The cancellation reaches the waiting flow at once. The shielded flow is cancelled only when its event loop ends.
    """

    flow: Flow[T]

    def __iter__(self) -> Generator[Shielded[T], T, T]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class Together:
    """Run flows concurrently, each on a separate thread or task, and wait for all of them.

    The first error is raised. Under asyncio it cancels the other flows. Threads cannot be cancelled, so a blocking
    caller waits for the other flows. An interrupted caller (Ctrl-C) does not wait: its threads continue.

    Attributes:
        flows: the flows to run.
        name: of the threads or tasks.
    """

    flows: tuple[Flow[object], ...]
    name: str

    def __iter__(self) -> Generator[Together, None, None]:
        yield self


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs on this thread, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class WakeUp:
    """A signal from another thread or task that the state may have changed. Sticky until `reset`; proves nothing.

    Attributes:
        sender: the event loop whose task will send it; None if that is unknown, or if a thread will send it.
    """

    __slots__ = ("_callbacks", "_lock", "_sent", "sender")

    def __init__(self, sender: asyncio.AbstractEventLoop | None = None) -> None:
        self.sender = sender
        self._lock = threading.Lock()
        self._sent = False
        self._callbacks: list[Callable[[], None]] = []

    def send(self) -> None:
        """Wake all waiters. May be called on any thread."""
        with self._lock:
            self._sent = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def reset(self) -> None:
        """Clear a wake-up that came before the next check of the state."""
        with self._lock:
            self._sent = False

    def call_when_sent(self, callback: Callable[[], None]) -> None:
        """Call back once; immediately if the wake-up was sent already. The callback must be quick and thread-safe."""
        with self._lock:
            if not self._sent:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Remove a callback."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)


Step: TypeAlias = "Command[Any] | Batch[Any] | Pause | Wait | Call[Any] | Shielded[Any] | Together"
Flow: TypeAlias = Generator[Step, Any, T]
