"""Descriptions of the I/O of an operation. This module itself does no I/O.

Every operation on the server is a `Command` or a `Flow`. A flow is a generator that yields steps, such as commands and
pauses, and receives their results. Two drivers perform the steps: `transport.executor` blocks the thread, and
`transport.async_executor` runs on asyncio. So each operation is written once, and a test can drive a flow with
``send()`` alone. No step is changed after its creation. The classes are not frozen, because a frozen object takes twice
as long to create, and each call creates some.

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
"""Arguments of a script, by the names in the header of the script.

The mapping has the order of the header, and the arguments are sent in this order. The value of a name that ends in
``...`` is a tuple. The tests compare every command with the header of its script, so that Python and Lua agree on the
order (tests/support/headers.py).
"""
Reply: TypeAlias = Any
"""A reply of the server: int, bytes, None or a list of these. The decoder of the command checks it."""


_MAX_DIGITS = 16
"""Maximum digits of a stored number, as in the fragment whole_number.lua."""


def whole_number(text: str | bytes | None) -> int:
    """Decode a stored whole number; 0 for None.

    Raises:
        ValueError: the text is not a whole number of at most 16 digits, so no script wrote it.
    """
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit()) or len(text) > _MAX_DIGITS:
        raise ValueError(f"{text!r} is not a stored whole number")
    return int(text)


@dataclass(slots=True)
class Command(Generic[T]):
    """Run one script, or one plain read command, and decode its reply.

    Attributes:
        script: a Script, or the name of a plain read-only command such as "MGET".
        keys: the keys, at least one, all in one hash slot.
        args: the arguments without the keys: by name for a script, in order for a plain command.
        decode: turns the reply into T. It must handle every possible reply, and raise CorruptState for an unexpected
            reply.
        resend_args: new values for some arguments of a script, by name, sent from the second delivery on. They tell
            the script that an earlier copy of the request may still be in flight.
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
            again: whether the command was already sent. If so, `resend_args` apply.
        """
        args = self.args
        if isinstance(args, tuple):
            return args
        flat: list[Any] = list(({**args, **self.resend_args} if again and self.resend_args else args).values())
        many = 0  # number of tuples at the end of `flat`; unpacking only these tuples saves 1 us per command
        while many < len(flat) and isinstance(flat[-1 - many], tuple):
            many += 1
        if many:
            flat[-many:] = [value for values in flat[-many:] for value in values]
        return flat


@dataclass(slots=True)
class Batch(Generic[T]):
    """Run several commands as one pipeline for each node. Not atomic: each command succeeds or fails on its own."""

    commands: tuple[Command[T], ...]

    def __iter__(self) -> Generator[Batch[T], list[T | AgentPerfError], list[T]]:
        """Wait for all replies. Return all results in order, or raise the first error."""
        results = yield self
        for result in results:
            if isinstance(result, AgentPerfError):
                raise result
        return cast("list[T]", results)

    def settled(self) -> Generator[Batch[T], list[T | AgentPerfError], list[T | AgentPerfError]]:
        """Return the result or the error of each command."""
        return (yield self)


@dataclass(slots=True)
class Pause:
    """Sleep for `seconds`."""

    seconds: float

    def __iter__(self) -> Generator[Pause, None, None]:
        yield self


@dataclass(slots=True)
class Wait:
    """Wait for a wake-up, at most `seconds`. Returns whether the wake-up came."""

    wake_up: WakeUp
    seconds: float

    def __iter__(self) -> Generator[Wait, bool, bool]:
        return (yield self)


@dataclass(slots=True)
class Call(Generic[T]):
    """Call user code and return its result. Under asyncio, an awaitable result is awaited.

    Exceptions of the function are raised in the flow. If the task is cancelled while the function runs, the
    CancelledError is raised in the flow too. The flow must `yield` this step directly, because a StopIteration of the
    function does not pass through a `yield from`.
    """

    function: Callable[[], T | Awaitable[T]]


@dataclass(slots=True)
class Shielded(Generic[T]):
    """Run a flow to its end, even if the waiting task is cancelled meanwhile. Returns the result of the flow.

    A cancellation is raised in the waiting flow at once. The shielded flow is cancelled only when its event loop ends.
    """

    flow: Flow[T]

    def __iter__(self) -> Generator[Shielded[T], T, T]:
        return (yield self)


@dataclass(slots=True)
class Together:
    """Run flows concurrently, each on a separate thread or task, and wait for all of them.

    The first error is raised. Under asyncio, the first error cancels the other flows. Threads cannot be cancelled, so a
    blocking caller waits for the other flows. If a blocking caller is interrupted (Ctrl-C), it does not wait, and the
    threads continue.

    Attributes:
        flows: the flows to run.
        name: the name of the threads or tasks.
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
    """A hint from another thread or task that the state may have changed. The hint stays set until `reset`.

    Attributes:
        sender: the event loop whose task will send the wake-up; None if a thread will send the wake-up, or if the
            sender is unknown.
    """

    __slots__ = ("_callbacks", "_lock", "_sent", "sender")

    def __init__(self, sender: asyncio.AbstractEventLoop | None = None) -> None:
        self.sender = sender
        # Reentrant: while this thread holds the lock, garbage collection may end a waiting task and thus call `forget`.
        self._lock = threading.RLock()
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
        """Clear the wake-up. Call this before the next check of the state."""
        with self._lock:
            self._sent = False

    def call_when_sent(self, callback: Callable[[], None]) -> None:
        """Call a quick and thread-safe `callback` once: at the next `send`, or now if the wake-up is set."""
        with self._lock:
            if not self._sent:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Remove a callback of `call_when_sent`."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)


Step: TypeAlias = "Command[Any] | Batch[Any] | Pause | Wait | Call[Any] | Shielded[Any] | Together"
Flow: TypeAlias = Generator[Step, Any, T]
