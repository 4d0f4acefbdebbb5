"""A blocking call in a running event loop warns once for each place. The warning shows the asyncio form of the call."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis import AgentPerf, AgentPerfError, LoadBalancer, LRUCache, MetricsCollector, TieredCache
from agentperf_redis.backend import Backend


def in_loop(*calls: Callable[[], object]) -> list[str]:
    """Make calls in a running event loop; return the texts of the warnings."""

    async def main() -> None:
        for call in calls:
            with contextlib.suppress(AgentPerfError):
                call()

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        asyncio.run(main())
    return [str(each.message) for each in shown]


SPELLINGS: dict[str, tuple[Callable[[Backend], Callable[[], object]], str]] = {
    "balancer": (lambda at: lambda: LoadBalancer(backend=at).acquire("coder"), "await lb.aio.acquire(...)"),
    "block": (lambda at: lambda: LoadBalancer(backend=at).lease("coder").__enter__(), "async with lb.aio.lease(...)"),
    "stack": (
        lambda at: lambda: contextlib.ExitStack().enter_context(LoadBalancer(backend=at).lease("coder")),
        "async with lb.aio.lease(...)",
    ),
    "lru": (lambda at: lambda: LRUCache(backend=at).get("k"), "await cache.aio.get(...)"),
    "tiered": (lambda at: lambda: TieredCache(backend=at).put("k", 1), "await cache.aio.put(...)"),
    "metrics": (lambda at: lambda: MetricsCollector(backend=at).snapshots(), "await metrics.aio.snapshots(...)"),
    "property": (lambda at: lambda: MetricsCollector(backend=at).metrics, "the methods of metrics.aio"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_warning_has_the_asyncio_spelling(dead_backend: Backend, name: str) -> None:
    make, spelling = SPELLINGS[name]
    (text,) = in_loop(make(dead_backend))
    assert "blocks the running event loop" in text
    assert text.endswith(f"use {spelling}" if spelling.startswith("the ") else f"use `{spelling}`")


def test_cached_function_is_named(dead_backend: Backend) -> None:
    @LRUCache(backend=dead_backend).cached(ttl=60)
    def answer() -> int:
        return 42

    (text,) = in_loop(answer)
    assert "answer()` blocks" in text
    assert "`async def`" in text


def test_closing_names_aclose() -> None:
    perf = AgentPerf("redis://127.0.0.1:1/0", deadline=0.05)
    perf.cache("c").put_many({})
    perf.metrics.record_execution("planner", 0.1, success=True)
    texts = in_loop(perf.close)
    assert all("await perf.aclose()" in text for text in texts if "blocks" in text)


def test_place_warns_once(dead_backend: Backend) -> None:
    cache = LRUCache(backend=dead_backend)

    def get() -> Any:
        return cache.get("k")

    def get_elsewhere() -> Any:
        return cache.get("k")

    assert len(in_loop(get, get, get)) == 1
    assert len(in_loop(get, get_elsewhere)) == 1, "another place warns, the first does not warn again"


def test_warning_points_at_the_call(dead_backend: Backend) -> None:
    cache = LRUCache(backend=dead_backend)

    async def main() -> None:
        with contextlib.suppress(AgentPerfError):
            cache.get("k")

    with pytest.warns(RuntimeWarning, match="blocks") as shown:
        asyncio.run(main())
    assert shown[0].filename == __file__


def test_calls_that_do_not_block_a_loop_do_not_warn(dead_backend: Backend) -> None:
    cache, metrics = LRUCache(backend=dead_backend), MetricsCollector(backend=dead_backend)

    async def main() -> None:
        with contextlib.suppress(AgentPerfError):
            await asyncio.to_thread(cache.get, "k")
        with contextlib.suppress(AgentPerfError):
            await cache.aio.get("k")
        metrics.record_execution("planner", 0.1, success=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
        with contextlib.suppress(AgentPerfError):
            cache.get("k")


@pytest.mark.parametrize(("file", "warns"), [("<stdin>", 0), ("cell.py", 0), ("module.py", 1)])
def test_code_typed_in_does_not_warn(
    dead_backend: Backend, monkeypatch: pytest.MonkeyPatch, file: str, warns: int
) -> None:
    if file == "cell.py":
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    names = {"cache": LRUCache(backend=dead_backend), "__name__": "__main__"}
    code = compile("cache.get('k')", file, "exec")
    assert len(in_loop(lambda: exec(code, names))) == warns
