"""If the API gets an asynchronous function, it awaits or refuses the function. Work is never lost silently."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import agentperf_redis
from agentperf_redis import AgentInstance, AgentPerf, LRUCache, PoolSettings, cached, track_performance
from agentperf_redis.balancer.async_client import AsyncLoadBalancer
from agentperf_redis.codec.codec import Codec
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.async_client import AsyncMetricsCollector
from tests.support.servers import wait_until


@dataclass
class Scene:
    """One use of a user's function."""

    perf: AgentPerf
    runner: asyncio.Runner
    caplog: pytest.LogCaptureFixture
    answer: Any = "answer"
    ran: list[tuple[Any, ...]] = field(default_factory=list)
    """The arguments of each run of the function's body."""

    def run(self, result: Any) -> Any:
        """Return a result. If it is awaitable, await it first."""

        async def wait() -> Any:
            return await result

        return self.runner.run(wait()) if inspect.isawaitable(result) else result

    @property
    def cache(self) -> LRUCache:
        return self.perf.cache("functions")

    def logged(self, text: str) -> None:
        wait_until(lambda: text in self.caplog.text, f"{text!r} in the log")


class Awaitable:
    def __init__(self, scene: Scene, args: tuple[Any, ...]) -> None:
        self.scene, self.args = scene, args

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        self.scene.ran.append(self.args)
        return self.scene.answer


Function = Callable[..., Any]


def coroutine_function(scene: Scene) -> Function:
    async def function(*args: Any) -> Any:
        await asyncio.sleep(0)
        scene.ran.append(args)
        return scene.answer

    return function


def callable_object(scene: Scene) -> Function:
    class Asynchronous:
        async def __call__(self, *args: Any) -> Any:
            return await coroutine_function(scene)(*args)

    return Asynchronous()


def partial(scene: Scene) -> Function:
    return functools.partial(coroutine_function(scene))


def plainly(function: Function) -> Function:
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def wrapped(scene: Scene) -> Function:
    inner = coroutine_function(scene)
    return functools.wraps(inner)(plainly(inner))


def plain(scene: Scene) -> Function:
    return plainly(coroutine_function(scene))


def awaitable(scene: Scene) -> Function:
    return lambda *args: Awaitable(scene, args)


def generator_function(scene: Scene) -> Function:
    def function(*args: Any) -> Iterator[Any]:
        scene.ran.append(args)
        yield scene.answer

    return function


def async_generator_function(scene: Scene) -> Function:
    async def function(*args: Any) -> AsyncIterator[Any]:
        scene.ran.append(args)
        yield scene.answer

    return function


def plain_generator(scene: Scene) -> Function:
    return plainly(generator_function(scene))


DECLARED = (coroutine_function, callable_object, partial)
"""Forms whose declaration tells that they are asynchronous."""
HIDDEN = (wrapped, plain, awaitable)
"""Forms that can be recognized as asynchronous only by the result of a call."""
GENERATORS = (generator_function, async_generator_function)


# The functions below are "places". Each place passes a user's function to one parameter of the public API, and returns
# the result. If the library refuses the function, the place raises an error. If the library only logs the refusal, the
# place raises the error itself.


def compute(scene: Scene, function: Function) -> Any:
    return scene.cache.get_or_compute("k", function)


def compute_async(scene: Scene, function: Function) -> Any:
    return scene.run(scene.cache.aio.get_or_compute("k", function))


def warm(scene: Scene, function: Function) -> Any:
    status = scene.cache.warm_up(["k"], function)
    for error in status.errors.values():
        raise error
    return scene.cache.get("k")


def warm_async(scene: Scene, function: Function) -> Any:
    scene.run(scene.cache.aio.warm_up(["k"], function))
    return scene.cache.get("k")


def warm_progress(scene: Scene, function: Function) -> Any:
    return scene.cache.warm_up(["k"], len, progress=function)


def warm_progress_async(scene: Scene, function: Function) -> Any:
    return scene.run(scene.cache.aio.warm_up(["k"], len, progress=function))


def decorate(scene: Scene, function: Function) -> Any:
    return scene.run(cached(scene.cache, name="function")(function)())


def key(scene: Scene, function: Function) -> Any:
    return scene.cache.cached(key=function)(len)("abc")


def function_progress(scene: Scene, function: Function) -> Any:
    return scene.cache.cached()(len).warm(["abc"], progress=function)


def function_progress_async(scene: Scene, function: Function) -> Any:
    async def length(text: str) -> int:
        return len(text)

    return scene.run(scene.cache.cached()(length).warm(["abc"], progress=function))


class Thing:
    pass


def dump(scene: Scene, function: Function) -> Any:
    registry = Registry()
    registry.add(Thing, dump=function, load=lambda state: Thing())
    return LRUCache(name="dump", backend=scene.perf.backend, codec=Codec(registry=registry)).put("k", Thing())


def load(scene: Scene, function: Function) -> Any:
    registry = Registry()
    registry.add(Thing, dump=lambda thing: 1, load=function)
    cache = LRUCache(name="load", backend=scene.perf.backend, codec=Codec(registry=registry))
    cache.put("k", Thing())
    assert cache.get("k", "MISS") == "MISS"
    assert cache.stats().corrupt == 1
    scene.logged("load of Thing is not a blocking function")
    raise InvalidArgument("load", function, "reported in the log")


def encode(scene: Scene, function: Function) -> Any:
    codec: Codec = Codec.__new__(type("Odd", (Codec,), {"encode": function}))
    return LRUCache(name="encode", backend=scene.perf.backend, codec=codec).put("k", 1)


def identify(scene: Scene, function: Function) -> Any:
    thing = type("Identified", (), {"__cache_key__": lambda self: function()})()
    return scene.cache.cached(name="identify")(lambda it: 1)(thing)


def registered(scene: Scene) -> Any:
    balancer = scene.perf.balancer(settings=PoolSettings(unhealthy_threshold=1))
    balancer.register_instance(AgentInstance("p0", "planner"))
    return balancer


def check(scene: Scene, function: Function) -> Any:
    balancer, scene.answer = registered(scene), False
    checks = balancer.run_checks("planner", function, interval=0.05)
    try:
        wait_until(lambda: balancer.status("planner")[0].instances[0].state.value == "down", "the checks to fail")
    finally:
        checks.stop()
    if "allowed: " in scene.caplog.text:
        raise InvalidArgument("check", function, "reported in the log")
    return False


def check_async(scene: Scene, function: Function) -> Any:
    balancer, scene.answer = registered(scene), False

    async def until_down() -> None:
        checks = asyncio.create_task(balancer.aio.run_checks("planner", function, interval=0.05))
        while (await balancer.aio.status("planner"))[0].instances[0].state.value != "down":
            assert not checks.done() or checks.result()
            await asyncio.sleep(0.01)
        checks.cancel()
        await asyncio.gather(checks, return_exceptions=True)

    scene.run(asyncio.wait_for(until_down(), 20))
    if "allowed: " in scene.caplog.text:
        raise InvalidArgument("check", function, "reported in the log")
    return False


def lose(scene: Scene, function: Function, lease: Any) -> Any:
    lease.lose("a test")
    scene.logged("on_lost is")
    raise InvalidArgument("on_lost", function, "reported in the log")


def acquire(scene: Scene, function: Function) -> Any:
    instance = registered(scene).acquire("planner", on_lost=function)
    return lose(scene, function, instance.lease)


def acquire_async(scene: Scene, function: Function) -> Any:
    instance = scene.run(registered(scene).aio.acquire("planner", on_lost=function))
    return lose(scene, function, instance.lease)


def lease(scene: Scene, function: Function) -> Any:
    block = registered(scene).lease("planner", on_lost=function)
    return lose(scene, function, block.__enter__())


def lease_async(scene: Scene, function: Function) -> Any:
    block = registered(scene).aio.lease("planner", on_lost=function)
    return lose(scene, function, scene.run(block.__aenter__()))


def repair(scene: Scene, function: Function) -> Any:
    return registered(scene).repair("planner", progress=function)


def repair_async(scene: Scene, function: Function) -> Any:
    return scene.run(registered(scene).aio.repair("planner", progress=function))


def track(scene: Scene, function: Function) -> Any:
    result = scene.run(track_performance("planner", scene.perf.metrics)(function)())
    assert scene.perf.metrics.snapshots()["planner"].success_count == 1
    return result


CALLBACK: tuple[set[Any], set[Any]] = (set(), {*DECLARED, *HIDDEN, *GENERATORS, plain_generator})
"""A callback is refused in every asynchronous form."""

PLACES: dict[str, tuple[Callable[[Scene, Function], Any], set[Any], set[Any]]] = {
    # Each key is a parameter, in the form that `parameters` yields. Each value has three items: the place, the awaited
    # forms of functions, and the refused forms.
    "LRUCache.get_or_compute(function)": (compute, set(), {*DECLARED, *HIDDEN}),
    "AsyncLRUCache.get_or_compute(function)": (compute_async, {*DECLARED, *HIDDEN}, set()),
    "LRUCache.warm_up(function)": (warm, set(), {*DECLARED, *HIDDEN}),
    "AsyncLRUCache.warm_up(function)": (warm_async, {*DECLARED, *HIDDEN}, set()),
    "LRUCache.warm_up(progress)": (warm_progress, *CALLBACK),
    "AsyncLRUCache.warm_up(progress)": (warm_progress_async, *CALLBACK),
    "cached()(function)": (decorate, {*DECLARED, wrapped}, {plain, awaitable, *GENERATORS}),
    "cached(key)": (key, *CALLBACK),
    "CachedFunction.warm(progress)": (function_progress, *CALLBACK),
    "AsyncCachedFunction.warm(progress)": (function_progress_async, *CALLBACK),
    "storable(dump)": (dump, *CALLBACK),
    "storable(load)": (load, set(), {*DECLARED, *HIDDEN, *GENERATORS}),
    "LRUCache(codec)": (encode, set(), {coroutine_function}),
    "__cache_key__": (identify, *CALLBACK),
    "LoadBalancer.run_checks(check)": (check, {*HIDDEN}, {*DECLARED, *GENERATORS, plain_generator}),
    "AsyncLoadBalancer.run_checks(check)": (check_async, {*DECLARED, *HIDDEN}, {*GENERATORS, plain_generator}),
    "LoadBalancer.acquire(on_lost)": (acquire, *CALLBACK),
    "AsyncLoadBalancer.acquire(on_lost)": (acquire_async, *CALLBACK),
    "LoadBalancer.lease(on_lost)": (lease, *CALLBACK),
    "AsyncLoadBalancer.lease(on_lost)": (lease_async, *CALLBACK),
    "LoadBalancer.repair(progress)": (repair, *CALLBACK),
    "AsyncLoadBalancer.repair(progress)": (repair_async, *CALLBACK),
    "track_performance()(func)": (track, {*DECLARED, *HIDDEN}, set()),
}

SAME = {
    "LRUCache.cached(key)": "cached(key)",
    "TieredCache.cached(key)": "cached(key)",
    "TieredCache.get_or_compute(function)": "LRUCache.get_or_compute(function)",
    "TieredCache.warm_up(function)": "LRUCache.warm_up(function)",
    "TieredCache.warm_up(progress)": "LRUCache.warm_up(progress)",
    "AsyncTieredCache.get_or_compute(function)": "AsyncLRUCache.get_or_compute(function)",
    "AsyncTieredCache.warm_up(function)": "AsyncLRUCache.warm_up(function)",
    "AsyncTieredCache.warm_up(progress)": "AsyncLRUCache.warm_up(progress)",
    "LoadBalancer.acquire_many(on_lost)": "LoadBalancer.acquire(on_lost)",
    "AsyncLoadBalancer.acquire_many(on_lost)": "AsyncLoadBalancer.acquire(on_lost)",
}
"""Parameters that are handled by the same code as another parameter."""


def parameters() -> Iterator[str]:
    """Yield every parameter of the public API whose annotation is a function type."""
    public = {name: getattr(agentperf_redis, name) for name in agentperf_redis.__all__}
    public |= {"AsyncLoadBalancer": AsyncLoadBalancer, "AsyncMetricsCollector": AsyncMetricsCollector}
    for name, thing in public.items():
        members = {name: thing}
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            members = {
                f"{name}.{member}": made
                for member, made in inspect.getmembers(thing, callable)
                if not member.startswith("_")
            }
        for path, function in members.items():
            if inspect.isfunction(function) or inspect.ismethod(function):
                for parameter in inspect.signature(function).parameters.values():
                    if any(word in str(parameter.annotation) for word in ("Callable", "OnProgress", "OnLost")):
                        yield f"{path}({parameter.name})"


def test_table_has_every_public_parameter() -> None:
    found = set(parameters())
    assert len(found) > 20
    assert found - PLACES.keys() - SAME.keys() == set()
    assert SAME.keys() <= found
    assert set(SAME.values()) <= PLACES.keys()


CASES = [
    pytest.param(place, form, awaits, id=f"{name}-{form.__name__}")
    for name, (place, awaited, refused) in PLACES.items()
    for form, awaits in itertools.chain(
        ((form, True) for form in (*DECLARED, *HIDDEN) if form in awaited),
        ((form, False) for form in (*DECLARED, *HIDDEN, *GENERATORS, plain_generator) if form in refused),
    )
]


@pytest.mark.parametrize(("place", "form", "awaits"), CASES)
def test_asynchronous_function_is_awaited_or_refused(
    perf: AgentPerf,
    runner: asyncio.Runner,
    caplog: pytest.LogCaptureFixture,
    place: Callable[[Scene, Function], Any],
    form: Callable[[Scene], Function],
    awaits: bool,
) -> None:
    scene = Scene(perf, runner, caplog)
    function = form(scene)
    with caplog.at_level(logging.DEBUG, "agentperf_redis"):
        if awaits:
            assert place(scene, function) == scene.answer
            assert scene.ran
        else:
            with pytest.raises(InvalidArgument, match="allowed: "):
                place(scene, function)
            assert not scene.ran
