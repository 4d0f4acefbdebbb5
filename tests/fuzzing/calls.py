"""Calls every public callable with hostile arguments on a real server, and checks how each call ends.

A call returns, or raises an error that the library documents. A call that is refused with InvalidArgument has sent
nothing, unless the refusal depends on the stored state. No call hangs. Afterwards, everything stored can be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import math
import queue
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter
from typing import Any
from unittest import mock

import hiredis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import agentperf_redis
from agentperf_redis import AgentInstance, AgentPerf, Lease, LoadBalancer, Lock, LRUCache, MetricsCollector, TieredCache
from agentperf_redis import errors as library_errors
from agentperf_redis.alerts.client import Alerts
from agentperf_redis.codec.codec import Codec
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import AgentPerfError, InvalidArgument, shown
from tests.fuzzing import values
from tests.fuzzing.values import UserError, Values

_MAX_TEXT = 2000
"""Maximum length of an error text. A value of the caller is shortened before it becomes part of the text."""
DEADLINE_S = 30.0
"""Deadline of a command, s. It is long, so that it does not pass on a busy machine."""
HANG_S = 4 * DEADLINE_S
"""A call that takes more seconds than this counts as hanging."""

UNEXPECTED = (
    library_errors.BackendUnavailable,
    library_errors.ScriptFailed,
    library_errors.CorruptState,
    library_errors.SchemaMismatch,
    library_errors.BackendFull,
)
"""Errors that a call cannot raise, whatever its arguments are, because the server and its data are fine."""

NOT_CALLED: dict[str, str] = {
    "AgentPerf.close": "ends the connections that all other calls use",
    "AgentPerf.aclose": "ends the connections that all other calls use",
    "Alerts.run": "takes no argument, and starts a thread",
    "AsyncAlerts.run": "takes no argument, and never returns",
    "Lease.become_copy": "not for users: called by the unpickling of a lease",
    "Lease.end": "not for users: called by the release of a lease",
    "Lease.kept_by": "not for users: called by the lease keeper",
    "Lease.lose": "not for users: called by the lease keeper",
    "PoolSettings.packed": "not for users: takes no argument",
    "PoolSettings.unpacked": "not for users: reads stored text, which the tests of damaged state change",
}
"""Public callables that are not called, and why."""


@dataclass
class Target:
    """A public callable.

    Attributes:
        name: its name, such as "LRUCache.get".
        function: the callable, bound to its object.
        own: valid values that are specific to this callable, by parameter.
        finish: a function that uses the result of a call, for example a decorator or a context manager.
    """

    name: str
    function: Callable[..., Any]
    own: Mapping[str, Values] = field(default_factory=dict)
    finish: Callable[[Any], Any] | None = None

    @property
    def method(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @cached_property
    def arguments(self) -> st.SearchStrategy[tuple[list[Any], dict[str, Any]]]:
        """Return a strategy that makes the arguments of a call: the positional ones, and those by name."""
        required: dict[str, Values] = {}
        optional: dict[str, Values] = {}
        several: Values = st.just([])
        for each in values.expanded(self.function):
            if each.kind is Parameter.VAR_KEYWORD:
                continue
            strategy = values.of(each, self.own)
            if each.kind is Parameter.VAR_POSITIONAL:
                several = st.lists(strategy, max_size=3)
            elif each.default is Parameter.empty or each.name in self.own or each.name in values.BOUNDED_WAITS:
                required[each.name] = strategy
            else:
                optional[each.name] = strategy
        by_name = st.fixed_dictionaries(required, optional=optional)
        return st.tuples(several, by_name).map(lambda parts: self._bound(*parts))

    def _bound(self, several: list[Any], by_name: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        if not several:
            return [], by_name
        leading = [
            each.name
            for each in values.expanded(self.function)
            if each.kind is Parameter.POSITIONAL_OR_KEYWORD and each.name in by_name
        ]
        return [by_name.pop(name) for name in leading] + several, by_name


def public(cls: type) -> dict[str, Any]:
    """Return the public methods of a class, without methods that this library does not define."""
    found = {}
    for name, member in inspect.getmembers_static(cls):
        function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if not name.startswith("_") and inspect.isfunction(function) and function.__module__.startswith("agentperf"):
            found[name] = member
    return found


class World:
    """A namespace with data of every kind, and the public callables that use this namespace."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url, self.namespace = url, namespace
        self.perf = AgentPerf(url, namespace=namespace, deadline=DEADLINE_S)
        perf, backend = self.perf, self.perf.backend
        self.balancer = perf.balancer()
        self.lease: Lease
        self.fill()
        self.caches = {
            "lru": perf.cache("c", max_size=50, local_size=10),
            "plain": perf.cache("plain", max_bytes=2_000_000, default_ttl=None),
            "tiered": perf.tiered_cache("c"),
        }
        metrics = perf.metrics

        @self.caches["plain"].cached(ttl=60.0)
        def blocking(x: Any = 1, *, y: Any = 2) -> Any:
            return [x, y]

        @self.caches["plain"].cached(ttl=60.0)
        async def awaited(x: Any = 1, *, y: Any = 2) -> Any:
            return [x, y]

        snapshot = metrics.get_or_create_metrics("a")
        (row, *_) = metrics.series("a", window="1m", step="10s")
        stats = perf.caches()[0]
        objects: list[tuple[str, Any]] = [
            ("AgentPerf", perf),
            ("MetricsCollector", metrics),
            ("AsyncMetricsCollector", metrics.aio),
            ("LRUCache", self.caches["lru"]),
            ("AsyncLRUCache", self.caches["lru"].aio),
            ("LRUCache", self.caches["plain"]),
            ("TieredCache", self.caches["tiered"]),
            ("AsyncTieredCache", self.caches["tiered"].aio),
            ("LoadBalancer", self.balancer),
            ("AsyncLoadBalancer", self.balancer.aio),
            ("Lock", perf.lock("l", blocking_timeout=0.01)),
            ("AsyncLock", perf.lock("l", blocking_timeout=0.01).aio),
            ("Lock", perf.lock("timed", timeout=5, blocking_timeout=0.01)),
            ("Semaphore", perf.semaphore("s", 2, blocking_timeout=0.01)),
            ("AsyncSemaphore", perf.semaphore("s", 2, timeout=5.0, blocking_timeout=0.01).aio),
            ("Alerts", perf.alerts),
            ("AsyncAlerts", perf.alerts.aio),
            ("Lease", self.lease),
            ("CachedFunction", blocking),
            ("AsyncCachedFunction", awaited),
            ("PerformanceMetrics", snapshot),
            ("SystemSummary", metrics.summary()),
            ("SeriesRow", row),
            ("CacheStats", stats),
            ("TierStats", stats.cold),
            ("CacheEntry", self._entry()),
        ]
        own: dict[str, dict[str, Values]] = {
            "register_instance": {"instance": _INSTANCES},
            "release": {"instance": st.builds(self._leased)},
            "release_many": {"instances": st.builds(lambda: [self._leased(), self._leased()])},
            "wait_until_idle": {"wait": st.sampled_from([0, 0.01])},
            "configure": {"settings": st.sampled_from([agentperf_redis.PoolSettings(slow_after=2.0)])},
            "warm_up": {"items": st.sampled_from([["k1", "k2"], []])},
            "warm": {"items": st.sampled_from([[1, 2], [], [(1,)]])},
        }
        functions: dict[str, dict[str, Values]] = {
            "acquire": {"blocking": st.sampled_from([None, True, False])},
        }
        self.targets: list[Target] = []
        for cls, each in objects:
            for name in public(getattr(agentperf_redis, cls, None) or type(each)):
                if f"{cls}.{name}" not in NOT_CALLED:
                    more = (
                        own.get(name, {}) if "Lock" not in cls and "Semaphore" not in cls else functions.get(name, {})
                    )
                    self.targets.append(
                        Target(f"{cls}.{name}", getattr(each, name), more, _FINISH.get(name, _finished))
                    )
        given = {"backend": st.just(backend)}
        for made in (LRUCache, TieredCache, LoadBalancer, MetricsCollector, Lock, agentperf_redis.Semaphore, Alerts):
            self.targets.append(Target(made.__name__, made, given))
        for value in (AgentInstance, agentperf_redis.PoolSettings, agentperf_redis.Retention):
            self.targets.append(Target(value.__name__, value))
        registry = {"registry": st.builds(Registry)}
        self.targets += [
            Target("AgentPerf", AgentPerf, {"url": _URLS}, lambda perf: perf.close()),
            Target("configure", agentperf_redis.configure, {"url": _URLS}, lambda backend: backend.close()),
            Target("memory_forecast", agentperf_redis.memory_forecast, {"agents": st.sampled_from([1, 9])}),
            Target("storable", agentperf_redis.storable, {"name": st.uuids().map(str)}),
            Target("Codec", Codec, registry),
            Target("Codec.encode", Codec().encode, {"value": values.PLAIN}),
            Target(
                "cached",
                agentperf_redis.cached,
                {"cache": st.sampled_from([*self.caches.values()]), "key": _KEY_MAKERS},
                _decorated,
            ),
            Target("track_performance", agentperf_redis.track_performance, {"collector": st.just(metrics)}, _decorated),
            Target("Span.attributes", _use_span(metrics)),
            Target("Lease.attributes", self._use_lease),
        ]

    def fill(self) -> None:
        """Create the data for the calls: instances, rules, records."""
        for name, pool in (("p0", "planner"), ("p1", "planner"), ("p0", "coder")):
            self.balancer.register_instance(AgentInstance(name, pool, max_capacity=1000, labels=frozenset({"t1"})))
        leased = self.balancer.acquire("planner")
        assert leased is not None
        assert isinstance(leased.lease, Lease)
        self.lease = leased.lease
        self.perf.alerts.deploy(text=values.RULES)
        self.perf.metrics.record_execution("a", 0.1, True)
        self.perf.metrics.flush()
        self.perf.cache("plain", max_bytes=2_000_000, default_ttl=None).put("k1", 1)

    def _entry(self) -> Any:
        entry = self.caches["plain"].entry("k1")
        assert entry is not None
        return entry

    def _leased(self) -> AgentInstance | None:
        return self.balancer.acquire("planner")

    def _use_lease(self, outcome: Any = "ok", retry_after: Any = 1.0, ttl: float = 1.0, tokens: Any = 1) -> None:
        with contextlib.suppress(agentperf_redis.NoCapacity), self.balancer.lease("planner") as lease:
            lease.tokens_used = tokens
            lease.outcome = outcome
            lease.retry_after = retry_after
            lease.extend(ttl)

    def read_everything(self) -> None:
        """Read everything stored, from another client. A damaged key raises CorruptState."""
        self.perf.metrics.flush()
        with AgentPerf(self.url, namespace=self.namespace, deadline=DEADLINE_S) as other:
            other.caches()
            for cache in (other.cache("plain"), other.cache("c"), other.tiered_cache("c")):
                for key in cache.keys()[:50]:
                    cache.entry(key)
                cache.stats()
                cache.series()
            balancer = other.balancer()
            for status in balancer.status():
                balancer.leases(status.agent_type)
                balancer.events(status.agent_type)
                balancer.repair(status.agent_type)
                balancer.series(status.agent_type)
            other.alerts.list()
            other.alerts.log()
            metrics = other.metrics
            for agent in metrics.snapshots():
                metrics.recent(agent)
                metrics.slowest(agent)
                metrics.spans(agent)
                metrics.streams(agent)
            metrics.snapshots(window="1h")
            metrics.series()
            metrics.workers()
            metrics.running()

    def close(self) -> None:
        """Close the connections."""
        self.perf.close()


def _use_span(metrics: MetricsCollector) -> Callable[..., None]:
    def use(agent_name: str, name: str, not_failures: Any = ()) -> None:
        with (
            metrics.track(agent_name) as outer,
            metrics.span(agent_name, name, parent=outer, not_failures=not_failures),
        ):
            metrics.record_tool_calls(calls=2)

    return use


_INSTANCES: Values = st.builds(
    AgentInstance,
    st.sampled_from(["p0", "p1", "new one"]),
    st.sampled_from(["planner", "coder", "a}b{c"]),
    max_capacity=st.sampled_from([1, 1000]),
    weight=st.sampled_from([0, 2.5]),
    labels=st.sampled_from([frozenset(), frozenset({"t1", "ä"})]),
    is_healthy=st.booleans(),
    is_draining=st.booleans(),
)
_URLS: Values = st.one_of(
    st.sampled_from(
        ["redis://h:1/0", "rediss://u:p@h", "unix:///x", "redis+cluster://a:1,b:2", "redis+sentinel://a/m"]
    ),
    st.sampled_from(
        ["redis://[::1", "redis://h:99999", "redis://h:x", "redis://", "http://h", "embedded://", "redis://%"]
    ),
    st.sampled_from(
        ["redis://[::1]:5/1?db=2", "redis://h?socket_timeout=x", "redis://\udc80", "redis://h/" + "9" * 5000]
    ),
    st.text(max_size=9).map("redis://".__add__),
)
_KEY_MAKERS: Values = st.sampled_from(
    [
        "{x}",
        "{x.a}",
        "{x[0]}",
        "{",
        "{0}",
        "{y!r:>99}",
        "a",
        "{nope}",
        lambda *_, **__: "k",
        lambda *_, **__: 5,
        values._raises,
    ]
)


def _decorated(decorator: Any) -> Any:
    def function(x: Any = 1, *, y: Any = 2) -> Any:
        return [x, y]

    wrapped = decorator(function)
    return [wrapped(), wrapped(2, y=[3]), wrapped(values.Rude(), y=None)]


def _finished(result: Any) -> Any:
    """Use up the result of a call: enter a context manager, stop a thread, or read an iterator to its end."""
    if hasattr(type(result), "__enter__") and not hasattr(type(result), "stop"):
        with contextlib.suppress(agentperf_redis.NoCapacity), result:
            pass
    elif hasattr(type(result), "stop"):
        result.stop()
    elif hasattr(type(result), "__next__"):
        list(result)
    return None


_FINISH: dict[str, Callable[[Any], Any]] = {"cached": _decorated}


class Caller:
    """Makes calls on one thread with an event loop, and notices calls that hang."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="fuzzed calls", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            while (task := self._work.get()) is not None:
                try:
                    self._done.put((task(runner), None))
                except BaseException as error:  # noqa: BLE001  every error is judged
                    self._done.put((None, error))

    def call(self, number: int, target: Target, args: list[Any], options: dict[str, Any]) -> BaseException | None:
        """Make one call. Returns its error, or None if it returned.

        Args:
            number: number of this call. The commands that the call sends are counted under this number.
            target: the callable.
            args: its positional arguments.
            options: its arguments by name.
        """

        def make(runner: asyncio.Runner) -> None:
            _call.set(number)
            result = target.function(*args, **options)
            if inspect.isawaitable(result) or target.name.startswith("Async"):
                awaited = _awaited(result, endless=target.method == "run_checks")
                runner.run(awaited, context=contextvars.copy_context())
            elif target.finish is not None:
                target.finish(result)

        self._work.put(make)
        try:
            error: BaseException | None = self._done.get(timeout=HANG_S)[1]
        except queue.Empty:
            frame = sys._current_frames()[self.thread.ident or 0]
            raise TimeoutError(f"{target.name} hangs:\n" + "".join(traceback.format_stack(frame))) from None
        return error

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self.thread.join(HANG_S)


async def _awaited(result: Any, *, endless: bool) -> None:
    if hasattr(type(result), "__aenter__"):
        with contextlib.suppress(agentperf_redis.NoCapacity):
            async with result:
                pass
    elif hasattr(type(result), "__anext__"):
        async for _ in result:
            pass
    elif endless:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(result, 0.02)
    elif inspect.isawaitable(result):
        _finished(await result)


_call: contextvars.ContextVar[int] = contextvars.ContextVar("call", default=0)
"""The number of the call that the running code belongs to; 0 in the background."""


@contextlib.contextmanager
def packed() -> Iterator[Counter[tuple[int, str]]]:
    """Count the commands that this process packs, by the number of the call and the name of the command."""
    counts: Counter[tuple[int, str]] = Counter()
    pack = hiredis.pack_command

    def counting(parts: tuple[Any, ...]) -> bytes:
        name = parts[0] if isinstance(parts[0], str) else parts[0].decode()
        counts[_call.get(), name] += 1
        packed_parts: bytes = pack(parts)
        return packed_parts

    with mock.patch.object(hiredis, "pack_command", counting):
        yield counts


AFTER_READING = {
    "silence": {"rule"},
    "unsilence": {"rule"},
    "series": {"step"},
    "incr": {"key"},
    "warm": {"x", "items"},  # an item is checked only after the earlier items are computed
    "warm_up": {"items"},
    "register_instance": {"shards"},
    "configure_pool": {"shards"},
    "attributes": {"outcome", "retry_after", "tokens_used", "ttl"},  # `_use_lease` acquires a lease before it uses them
}
"""The arguments that a method may refuse after a request, because the refusal depends on the stored state."""
_WRONG_ARITY = re.compile(r"too many positional arguments|missing a required argument|unexpected keyword")


class Fuzzer:
    """Makes calls and collects complaints.

    Attributes:
        complaints: one example of each kind of fault.
        ends: how often calls ended in each way.
        sent: how many commands the calls have sent, by name. Commands sent in the background are not counted.
    """

    def __init__(self, world: World, counts: Counter[tuple[int, str]]) -> None:
        self.world = world
        self._counts = counts
        self._caller = Caller()
        self._number = 0
        self.sent: Counter[str] = Counter()
        self.complaints: dict[str, str] = {}
        self.ends: Counter[str] = Counter()

    def call(self, target: Target, args: list[Any], options: dict[str, Any]) -> None:
        """Make a call, and judge how it ends."""
        self._number += 1
        error = self._caller.call(self._number, target, args, options)
        sent = sum(count for (number, _), count in self._counts.items() if number == self._number)
        if sent:  # remove these counts, so that the sum above stays fast
            for key in [key for key in self._counts if key[0] == self._number]:
                self.sent[key[1]] += self._counts.pop(key)
        how = "returned" if error is None else type(error).__name__
        self.ends[how] += 1
        wrong = self._wrong(target, error, sent)
        if wrong:
            where = _place(error) if error is not None else ""
            self.complaints.setdefault(
                f"{target.name}: {wrong.partition(':')[0]} {where}",
                f"{wrong}; args {shown(args)} {_text(options)} {where}",
            )

    def _wrong(self, target: Target, error: BaseException | None, sent: int) -> str:
        """Return a description of what is wrong with the end of a call, or an empty text."""
        if error is None or isinstance(error, UserError):
            return ""
        if isinstance(error, TypeError) and _WRONG_ARITY.search(str(error)):
            return ""
        if isinstance(error, InvalidArgument):
            if len(str(error)) > _MAX_TEXT:
                return f"InvalidArgument of {len(str(error))} characters: {str(error)[:300]}"
            refused = target.finish is _decorated or error.argument in AFTER_READING.get(target.method, ())
            return (
                f"InvalidArgument({error.argument}) after {sent} commands: {error!s:.300}"
                if sent and not refused
                else ""
            )
        if isinstance(error, UNEXPECTED) or not isinstance(error, AgentPerfError) or type(error) is AgentPerfError:
            return f"{type(error).__name__}: {error!s:.300}"
        return f"{type(error).__name__} of {len(str(error))} characters" if len(str(error)) > _MAX_TEXT else ""

    def run(self, examples: int, *, only: str = "", number: int | None = None, until: float = math.inf) -> None:
        """Make calls with arguments that Hypothesis chooses.

        Args:
            examples: number of calls.
            only: part of the names of the targets.
            number: seed of the choices; None for the seed of the Hypothesis profile.
            until: no call begins after this time, by `time.monotonic`.
        """
        targets = [target for target in self.world.targets if only in target.name]

        def call(data: st.DataObject) -> None:
            target = targets[data.draw(st.integers(0, len(targets) - 1))]
            args, by_name = data.draw(target.arguments)
            if time.monotonic() < until:
                self.call(target, args, by_name)

        # A call changes the stored state, so a repeated call may end differently. Hence failures are not shrunk.
        unhurried: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": [*HealthCheck]}
        calls = settings(max_examples=examples, phases=[Phase.generate], **unhurried)(given(st.data())(call))
        (calls if number is None else seed(number)(calls))()

    def close(self) -> None:
        """End the thread of the calls."""
        self._caller.close()


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/agentperf_redis/" in frame.filename]
    return f"at {own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}" if own else "outside"


def _text(options: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name}={shown(value)}" for name, value in options.items()) + "}"
