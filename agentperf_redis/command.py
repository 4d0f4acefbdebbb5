"""I/O described, not done.

Whatever the library does to the server is a `Command`, or a `Flow` of several: a generator that yields what it needs
and is sent the answers. Two thin drivers (`transport.executor`, `transport.async_executor`) perform them, one blocking
and one for asyncio, so nothing is written twice and a flow is tested with ``send()`` alone.

    def acquire_or_wait(...) -> Flow[Lease]:
        lease = yield from acquire(...)          # a Command: typed exactly
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
"""A script's arguments by the names in its header, in the header's order.

A name that ends in ``...`` has a tuple of values. The order is the wire order. While tests run, every command is
compared with its header, so the order cannot drift between Python and Lua (tests/headers.py).
"""
Reply: TypeAlias = Any
"""What the server answered: int, bytes, None or a list of these. Decoders take it from there."""


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """Run one script, or one plain read command, and decode its reply.

    Attributes:
        script: a Script, or the name of a plain command such as "MGET" that changes nothing.
        keys: its keys, all in one hash slot; at least one.
        args: its further arguments: of a script by name, of a plain command in order.
        decode: turns the reply into T; must answer every reply, an unexpected one with CorruptState.
        resend_args: the arguments of a script that differ from the second delivery on, by name. With them a script
            learns that a copy of the request may still be under way.
    """

    script: Script | str
    keys: tuple[str, ...]
    args: NamedArgs | tuple[Arg, ...]
    decode: Callable[[Reply], T]
    resend_args: Mapping[str, Arg] | None = None

    def __iter__(self) -> Generator[Command[T], T, T]:
        return (yield self)

    def wire_args(self, *, again: bool = False) -> Sequence[Arg]:
        """Return the arguments in the order in which they are sent.

        Args:
            again: the command was sent before.
        """
        args = self.args
        if isinstance(args, tuple):
            return args
        flat: list[Any] = list(({**args, **self.resend_args} if again and self.resend_args else args).values())
        many = 0  # names with any number of values come last: unpacking only those saves 1 us a command
        while many < len(flat) and isinstance(flat[-1 - many], tuple):
            many += 1
        if many:
            flat[-many:] = [value for values in flat[-many:] for value in values]
        return flat


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Run several commands as one pipeline. Not atomic: each command stands for itself."""

    commands: tuple[Command[T], ...]

    def __iter__(self) -> Generator[Batch[T], list[T | AgentPerfError], list[T]]:
        """Return all results in order, or raise the first error after all have been answered."""
        results = yield self
        for result in results:
            if isinstance(result, AgentPerfError):
                raise result
        return cast("list[T]", results)

    def settled(self) -> Generator[Batch[T], list[T | AgentPerfError], list[T | AgentPerfError]]:
        """Return for each command its result, or the error it met."""
        return (yield self)


@dataclass(frozen=True, slots=True)
class Pause:
    """Let time pass: `seconds` of it."""

    seconds: float

    def __iter__(self) -> Generator[Pause, None, None]:
        yield self


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a hint, at most `seconds`. Returns whether the hint came."""

    wake_up: WakeUp
    seconds: float

    def __iter__(self) -> Generator[Wait, bool, bool]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """Call code of the user's, and return what it returns; under asyncio, what it returns is awaited if it can be.

    The flow gets whatever the function raises, and so does a task's cancellation while the function runs. Its `yield`
    must be the flow's own: a StopIteration, which a function may raise as well, does not get through a `yield from`.
    """

    function: Callable[[], T | Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Shielded(Generic[T]):
    """Run a flow to its end, even if the task that waits for it is cancelled meanwhile. Returns what the flow returns.

    The cancellation reaches the waiting flow at once; the shielded one hears of it only when its event loop ends.
    """

    flow: Flow[T]

    def __iter__(self) -> Generator[Shielded[T], T, T]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class Together:
    """Run flows at the same time, each on a thread or task of its own, and wait for all of them.

    The first error is raised. Under asyncio it cancels the other flows; threads cannot be cancelled, so the flows of a
    blocking caller are waited for. An interrupted caller (Ctrl-C) does not wait: its threads run on.

    Attributes:
        flows: what to run.
        name: of the threads or tasks.
    """

    flows: tuple[Flow[object], ...]
    name: str

    def __iter__(self) -> Generator[Together, None, None]:
        yield self


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs on this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class WakeUp:
    """A word from another thread or task that it may be worth looking again. Sticky until `reset`; never the truth.

    Attributes:
        sender: the event loop one of whose tasks will give it; None when that is not known, or a thread will.
    """

    __slots__ = ("_callbacks", "_lock", "_sent", "sender")

    def __init__(self, sender: asyncio.AbstractEventLoop | None = None) -> None:
        self.sender = sender
        self._lock = threading.Lock()
        self._sent = False
        self._callbacks: list[Callable[[], None]] = []

    def send(self) -> None:
        """Give the hint: wakes whoever waits, from any thread."""
        with self._lock:
            self._sent = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def reset(self) -> None:
        """Forget a hint that came before the look that is about to be taken."""
        with self._lock:
            self._sent = False

    def call_when_sent(self, callback: Callable[[], None]) -> None:
        """Call back once, at once if the hint was given already. The callback must be quick and thread-safe."""
        with self._lock:
            if not self._sent:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Take a callback back."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)


Step: TypeAlias = "Command[Any] | Batch[Any] | Pause | Wait | Call[Any] | Shielded[Any] | Together"
Flow: TypeAlias = Generator[Step, Any, T]
