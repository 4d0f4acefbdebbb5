"""`Backend`: the access of one process to one namespace on one server.

A backend owns the message bus, the epoch, the objects of the services, and the drivers. The drivers run flows.

The process-wide default backend is also in this module. A client without an explicit backend can thus find it without
an import from a higher layer.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import math
import os
import socket
import threading
import time
import weakref
from asyncio import _get_running_loop  # returns None if no loop runs; the public function raises, ten times slower
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NoReturn, TypeVar, cast

from agentperf_redis import arguments, keys, process_end, sigterm
from agentperf_redis.background import Background, ModuleLock, register_for_fork
from agentperf_redis.blocking_calls import warn_of_blocking_call
from agentperf_redis.closing import CloseCallbacks
from agentperf_redis.command import Command, Flow, Reply, running_loop
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, InvalidArgument
from agentperf_redis.open_clients import OpenClient, place_of_creation
from agentperf_redis.script import Script
from agentperf_redis.transport.address import parse_url, resolve_url, url_in_environment
from agentperf_redis.transport.async_executor import AsyncExecutor
from agentperf_redis.transport.breaker import PROBE_S, Breaker
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import ExchangeFailed, transient_reason
from agentperf_redis.transport.executor import Executor, Runnable
from agentperf_redis.transport.handshake import Handshake
from agentperf_redis.transport.pubsub.bus import Bus
from agentperf_redis.transport.resp import ServerError, pack
from agentperf_redis.transport.topology import Node, Topology

T = TypeVar("T")

_log = logging.getLogger("agentperf_redis")

DEFAULT_NAMESPACE = "agentperf"
NAMESPACE_VARIABLE = "AGENTPERF_NAMESPACE"
"""Environment variable used when no namespace is given."""
DEFAULT_DEADLINE_S = 5.0
_LOOP_ENDS_CLOSE_S = 1.0
"""How long `close` waits for flows that the end of an event loop interrupted. After that, their leases expire."""
_LAYOUT_S = 1.0
"""How long a request for the layout (the map of keys to nodes) waits for the answer of one node, s."""
_LOG_ABSENCE_EVERY_S = 10.0
_ENTER = Script("namespace/enter")


class Backend:
    """A namespace on a server. The backend connects on the first command.

    Args:
        url: where the server is; see `agentperf_redis.transport.address`. None: the URL in AGENTPERF_REDIS_URL, else
            in REDIS_URL, else localhost.
        namespace: prefix of all keys. None: AGENTPERF_NAMESPACE, else "agentperf".
        deadline: total seconds that one command may take, retries included.
        flush_on_sigterm: whether SIGTERM first flushes the metrics; see `AgentPerf`.

    Raises:
        InvalidArgument: for an invalid argument, and for `flush_on_sigterm` outside the main thread.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str | None = None,
        deadline: float = DEFAULT_DEADLINE_S,
        flush_on_sigterm: bool = False,
    ) -> None:
        self.address = parse_url(resolve_url(url))
        self.namespace = keys.check_namespace("namespace", resolve_namespace(namespace))
        self.deadline = arguments.seconds("deadline", deadline, minimum=0.01, maximum=3600.0)
        self.flush_on_sigterm = arguments.flag("flush_on_sigterm", flush_on_sigterm)
        self.process = _process_id()
        self.closed = self._close_ended = False
        self._made_at = place_of_creation()
        self._open_client: OpenClient | None = None
        self._absence_logged_at = -math.inf
        self._connector = Connector(self.address, defaulted=url is None and not url_in_environment())
        self._topology = Topology(self.address)
        self._lock = threading.RLock()
        self._close_callbacks = CloseCallbacks(repr(self), self._lock)
        self._shared: dict[Hashable, Any] = {}
        self._epoch: str | None = None
        self._epoch_callbacks: list[Callable[[], None]] = []
        self._entered: set[str] = set()
        self._inherited: list[object] = []
        self._foreign_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._recovery_callbacks: list[Callable[[], None]] = []
        self._handshake = Handshake(self.address.masked, self.namespace, self._note_epoch)
        topology = self._topology
        learn = None if topology.fixed else self._learn
        self._breaker = Breaker(topology, self.deadline, self._answers, learn, self._note_recovery)
        self._checks = Background("agentperf-check", lingers=False)
        self._loop_ends = Background("agentperf-loop-end", lingers=False)
        self._make_drivers()
        self.bus = Bus(self._connector, topology.node_for, topology.doubt, learn, self._check_server_soon)
        _backends.add(self)
        register_for_fork(self)
        if flush_on_sigterm:
            sigterm.flush_at_sigterm(self)

    def _make_drivers(self) -> None:
        self._executor = Executor(self._connector, self._topology, self._breaker, self.deadline, self._handshake)
        self._async_executors: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncExecutor] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client cannot be pickled or copied: create one in the other process, with the same URL")

    def __repr__(self) -> str:
        return f"Backend({self.address.masked!r}, namespace={self.namespace!r})"

    @property
    def primaries(self) -> tuple[Node, ...]:
        """The nodes that hold the keys, as known from the commands so far; empty before the first command."""
        return self._topology.primaries

    def node_of(self, key: str) -> Node | None:
        """Return the node that holds a key; None if this process does not know it yet. The answer may be outdated."""
        return self._topology.node_for(key)

    def run(self, flow: Runnable[T], deadline: float | None = None) -> T:
        """Run a command or flow, and block until it ends. Returns its result.

        Args:
            flow: the command or flow.
            deadline: max seconds for each command of the flow; None uses the deadline of the backend.

        Raises:
            AgentPerfError: an error of a command that the flow does not catch.
        """
        if _get_running_loop() is not None:
            warn_of_blocking_call()
        return self._executor.run(flow, deadline)

    async def arun(self, flow: Runnable[T], deadline: float | None = None) -> T:
        """Run a command or flow on the running asyncio loop. Arguments as for `run`."""
        loop = asyncio.get_running_loop()
        executor = self._async_executors.get(loop)
        if executor is None:
            executor = await self._start_async(loop)
        return await executor.run(flow, deadline)

    async def _start_async(self, loop: asyncio.AbstractEventLoop) -> AsyncExecutor:
        if loop in self._foreign_loops:
            raise AgentPerfError(
                "this event loop was inherited by a fork and still belongs to the parent; use a new one"
            )
        self._drop_closed_loops()
        executors, place = self._async_executors, weakref.ref(loop)

        def ended() -> None:
            gone = place()
            if gone is not None:
                executors.pop(gone, None)

        executor = AsyncExecutor(
            self._connector,
            self._topology,
            self._breaker,
            self.deadline,
            self._handshake,
            ended,
            self._executor,
            self._loop_ends.put,
        )
        if self.closed:  # after `close`, a flow can still run, but its commands fail, as with `run`
            executor.close_now()
            return executor
        executors[loop] = executor
        await executor.start()
        return executor

    def _executors_by_loop(self) -> list[tuple[asyncio.AbstractEventLoop, AsyncExecutor]]:
        """Return the loops and their executors, even while other threads or the garbage collector change the map.

        `keyrefs` lists the map in one call of C code. `items` runs Python code between two entries, and raises
        RuntimeError if the map changes meanwhile.
        """
        loops = [loop for reference in self._async_executors.keyrefs() if (loop := reference()) is not None]
        found = [(loop, self._async_executors.get(loop)) for loop in loops]
        return [(loop, executor) for loop, executor in found if executor is not None]

    def _drop_closed_loops(self) -> None:
        """Close the executors of closed event loops, in case an executor has not noticed the end of its loop.

        The map of executors refers to a loop only weakly, but the transport of each connection refers strongly to its
        loop. Without this method, a closed loop and its connections would never be garbage-collected.
        """
        for loop, executor in self._executors_by_loop():
            if loop.is_closed():
                executor.close_now()
                self._loop_ends.put(executor.finish)

    def call_at_loop_end(self, key: object, callback: Callable[[], object]) -> None:
        """Call `callback` on a background thread when the running loop ends, unless `forget_loop_end` is called first.

        Before this call, a flow of this backend must have run on the loop.
        """
        executor = self._async_executors.get(asyncio.get_running_loop())
        if executor is not None:
            executor.call_at_loop_end(key, callback)

    def forget_loop_end(self, key: object) -> None:
        """Remove a callback of `call_at_loop_end`."""
        executor = self._async_executors.get(asyncio.get_running_loop())
        if executor is not None:
            executor.forget_loop_end(key)

    def enter(self, service: str, resource: str, *, again: bool = False) -> Flow[bool]:
        """Record on the server that a resource is in use. Returns whether this call has sent the record.

        Each process sends the record of a resource once. `again` sends the record once more, which is necessary after
        the server lost its data.
        """
        name = f"{service}:{keys.encoded(resource)}"
        if not again and name in self._entered:
            return False
        where = keys.resources(self.namespace)
        yield from Command(_ENTER, (where,), {"resource": name}, lambda reply: _noted(where, reply))
        self._entered.add(name)
        return True

    def leave(self, service: str, resource: str) -> Flow[None]:
        """Remove a dropped resource from the list of resources.

        A late duplicate of the command may remove a resource that was entered again after the drop. The next process
        that begins to use the resource enters it once more.
        """
        where, name = keys.resources(self.namespace), f"{service}:{keys.encoded(resource)}"
        yield from Command("ZREM", (where,), (name,), lambda _: None)
        self._entered.discard(name)

    def entered(self, service: str) -> Flow[list[str]]:
        """Return the sorted names of all resources of one service that were ever used by any process."""
        where = keys.resources(self.namespace)
        names = yield from Command("ZRANGE", (where,), (0, -1), lambda reply: _names(where, reply))
        start = f"{service}:"
        return sorted(keys.decoded(name[len(start) :]) for name in names if name.startswith(start))

    def share(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return this process's object for a key. The first call with the key creates the object."""
        with self._lock:
            if key not in self._shared:
                self._shared[key] = make()
            return cast("T", self._shared[key])

    def on_new_epoch(self, callback: Callable[[], None]) -> None:
        """Call `callback` after the server came back without its data.

        The loss is detected when a connection opens. The thread that opens the connection runs the callback. It may be
        the thread of an event loop, so the callback must be quick and do no I/O.
        """
        self._epoch_callbacks.append(callback)

    def on_recovery(self, callback: Callable[[], None]) -> None:
        """Call `callback` on a separate thread when a server answers again after a long outage.

        The callback may run commands. The backend first sends a command of its own. If this command opens a new
        connection, the handshake shows whether the server lost its data. So if the server came back without its data,
        the callbacks of `on_new_epoch` run before the callbacks of this method.
        """
        self._recovery_callbacks.append(callback)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` before the connections close, so that it may run commands. The newest callback runs first.

        If the close callbacks have already run, `callback` is called at once, so that a service created later is
        closed immediately.
        """
        self._close_callbacks.add(callback)

    def off_close(self, callback: Callable[[], None]) -> None:
        """Remove a callback of `on_close`. Does nothing if the callback is not registered or was called already."""
        self._close_callbacks.remove(callback)

    def close(self) -> None:
        """Flush the buffers and close the connections. A second call does nothing.

        If `SystemExit` or `KeyboardInterrupt` of a signal handler ends this call early, the next call continues. A call
        on another thread waits until this call has flushed.
        """
        if self._close_ended:
            return
        self._breaker.stop()
        self._loop_ends.close(_LOOP_ENDS_CLOSE_S)
        if not self._close_callbacks.run():
            return
        self.closed = True
        self.bus.close()
        for loop, executor in self._executors_by_loop():
            if loop.is_running() and loop is not running_loop():
                loop.call_soon_threadsafe(executor.close_now)
            else:
                executor.close_now()
        self._executor.close()
        if self._open_client is not None:
            self._open_client.closed()
        sigterm.release(self)
        self._close_ended = True

    async def aclose(self) -> None:
        """Like `close`, without blocking the loop."""
        if self._close_ended:
            return
        self._breaker.stop()
        await asyncio.to_thread(self._close_callbacks.run)
        executor = self._async_executors.pop(asyncio.get_running_loop(), None)
        if executor is not None:
            await executor.aclose()
        await asyncio.to_thread(self.close)
        sigterm.release(self)  # `close` ran on another thread, but only the main thread can restore the handler

    def log_absence(self, error: BackendUnavailable) -> None:
        """Log a warning that a call goes on without the server, at most once every ten seconds."""
        now = time.monotonic()
        if now - self._absence_logged_at >= _LOG_ABSENCE_EVERY_S:
            self._absence_logged_at = now
            _log.warning("load balancer: calls return without a lease: %s", error)

    def _note_epoch(self, epoch: str) -> None:
        """Compare the epoch that a server reported with the known epoch."""
        with self._lock:
            known, self._epoch = self._epoch, epoch
            changed = known is not None and known != epoch
            if self._open_client is None and not self.closed:
                self._open_client = OpenClient(self.address.masked, self.namespace, self._made_at)
            if changed:
                self._entered.clear()
        if changed:
            _log.warning("%s came back without its data: registering again, leases are lost", self.address.masked)
            _call_all(self._epoch_callbacks)

    def _answers(self, node: Node) -> bool:
        """Whether a node answers a command. A permanent error reply, which callers should see, counts as an answer."""
        try:
            reply = self._connector.request(node, pack(("PING",)), PROBE_S)
        except ExchangeFailed as failed:
            return failed.final
        except BackendUnavailable:
            # The embedded server cannot start. So commands fail at once, and the breaker is not needed.
            return True
        return not (isinstance(reply, ServerError) and transient_reason(reply.text))

    def _note_recovery(self) -> None:
        self._check_server()
        _call_all(self._recovery_callbacks)

    def _learn(self) -> str:
        """Refresh the layout from one node, a different one on each call. Return the error text, empty on success."""
        node, request = self._topology.layout_request()
        try:
            return self._topology.learn(node, self._connector.request(node, request, _LAYOUT_S))
        except ExchangeFailed as failed:
            return failed.reason

    def _check_server_soon(self) -> None:
        """Check soon whether the server lost its data.

        The bus calls this after it has lost a connection. Without this call, the loss of data would be noticed only at
        the next command of a caller, which may come much later.
        """
        if not self.closed:
            self._checks.at(time.monotonic(), self._check_server)

    def _check_server(self) -> None:
        """Send a command without effect. If no connection works, this opens a new one, with a handshake."""
        with contextlib.suppress(AgentPerfError):
            self._executor.run(Command("ECHO", (keys.meta(self.namespace),), (), lambda _: None))

    def after_fork(self) -> None:
        """In a forked child: replace everything that has a lock or a socket.

        The old objects are kept and not closed, because their sockets belong to the parent. The order matters: the
        drivers and the bus use the objects that are replaced before them.
        """
        executors = self._executors_by_loop()
        self._inherited.append((self._executor, dict(executors), self._lock))
        for loop, _ in executors:
            self._foreign_loops.add(loop)
        self._lock = threading.RLock()
        self._close_callbacks.after_fork(self._lock)
        self._connector.after_fork()
        self._breaker.after_fork()
        self._make_drivers()
        self.process = _process_id()
        self.bus.after_fork()


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in list(callbacks):
        try:
            callback()
        except Exception:  # noqa: BLE001  the other services must still recover
            _log.exception("the recovery callback of a service failed")


def resolve_namespace(namespace: str | None) -> str:
    """Return the given namespace, else the value of AGENTPERF_NAMESPACE, else "agentperf"."""
    return os.environ.get(NAMESPACE_VARIABLE) or DEFAULT_NAMESPACE if namespace is None else namespace


def _process_id() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"


def _noted(where: str, reply: Reply) -> None:
    if reply != 1:
        raise CorruptState(where, f"an unexpected reply {reply!r}")


def _names(where: str, reply: Reply) -> list[str]:
    if not isinstance(reply, list) or not all(isinstance(name, bytes) for name in reply):
        raise CorruptState(where, f"an unexpected reply {str(reply)[:200]}")
    return [name.decode(errors="replace") for name in reply]


_backends: weakref.WeakSet[Backend] = weakref.WeakSet()
_default: Backend | None = None
_default_lock = ModuleLock()


def default_backend() -> Backend:
    """Return the process-wide default backend; the first call creates it."""
    global _default  # noqa: PLW0603  the only global variable of the library
    with _default_lock.lock:
        if _default is None or _default.closed:
            _default = Backend()
        return _default


def chosen_backend(backend: object) -> Backend:
    """Check the `backend` argument of a client, and return the backend; None means the process-wide default."""
    if backend is None:
        return default_backend()
    if not isinstance(backend, Backend):
        raise InvalidArgument("backend", backend, "a Backend, such as perf.backend, or None")
    return backend


def configure(
    url: str | None = None,
    *,
    namespace: str | None = None,
    deadline: float = DEFAULT_DEADLINE_S,
    flush_on_sigterm: bool = False,
) -> Backend:
    """Set the process-wide default backend. Clients that are created without a backend use it.

    Args:
        url: where the server is.
        namespace: prefix of all keys.
        deadline: total seconds that one command may take, retries included.
        flush_on_sigterm: whether SIGTERM first flushes the metrics; see `AgentPerf`.

    Returns:
        The new default.

    Raises:
        AgentPerfError: if another default is already in use; close it first, or call `configure` earlier.
    """
    global _default  # noqa: PLW0603  as above
    with _default_lock.lock:
        new = Backend(url, namespace=namespace, deadline=deadline, flush_on_sigterm=flush_on_sigterm)
        old = _default
        if old is not None and not old.closed:
            if (old.address, old.namespace, old.deadline, old.flush_on_sigterm) == (
                new.address,
                new.namespace,
                new.deadline,
                new.flush_on_sigterm,
            ):
                return old
            raise AgentPerfError(
                f"the default is already {old!r}, and objects may be using it: call configure() before creating any, "
                "or close the default first"
            )
        _default = new
        return new


@contextlib.contextmanager
def another_default() -> Iterator[None]:
    """Use another process-wide default backend in the block, set by environment variables. Close it after the block."""
    global _default
    with _default_lock.lock:
        kept, _default = _default, None
    try:
        yield
    finally:
        with _default_lock.lock:
            made, _default = _default, kept
        if made is not None:
            made.close()


def close_all(url: str | None = None) -> None:
    """Close the backends of this process. With a URL, only those of this server."""
    address = None if url is None else parse_url(url)
    for backend in list(_backends):
        if address in (None, backend.address):
            with contextlib.suppress(Exception):
                backend.close()


@atexit.register
def _close_at_exit() -> None:
    for backend in list(_backends):
        with contextlib.suppress(Exception, SystemExit):
            process_end.despite_exit(backend.close)


def in_use(namespace: str) -> bool:
    """Return whether an open backend of this process uses a namespace."""
    return any(backend.namespace == namespace and not backend.closed for backend in list(_backends))
