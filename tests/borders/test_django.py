"""Tests of `AgentPerfCache` for Django's cache framework: Django's own tests, and tests of further promises.

Django's own tests come from its source distributions, which pip downloads. Without a network, they are skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import NoInteger
from agentperf_redis.backend import another_default, default_backend
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from tests.support import downloads
from tests.support.places import ROOT
from tests.support.servers import Server, wait_until
from tests.support.workers import Workers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("django") is None, reason="needs the extra django"),
    pytest.mark.servers("valkey", "cluster"),
]

VERSIONS = ("4.2.30", "5.2.19")
"""The oldest version that the extra django allows, and the newest version for Python 3.11. Django is pure Python, so
the tests use the framework from the source distribution, which also contains Django's tests."""
BACKEND = "agentperf_redis.integrations.django.AgentPerfCache"
ASYNC_BACKEND = "tests.support.django_suite.AsyncCache"
CACHE_TESTS = "tests.support.django_suite.CacheTests"
SESSION_TESTS = tuple(
    f"sessions_tests.tests.{name}"
    for name in ("CacheSessionTests", "CacheDBSessionTests", "CacheDBSessionWithTimeZoneTests")
)
PASSED = {"4.2.30": (52, 121), "5.2.19": (52, 210)}
"""For each version, the number of its tests of caches and of sessions. Of the 54 tests that Django has for every cache
backend, two are left out: test_cull expects that a full cache loses a third of its entries, and test_zero_cull expects
that it loses all."""


def cache_class() -> Any:
    from agentperf_redis.integrations.django import AgentPerfCache

    return AgentPerfCache


@pytest.fixture
def made(server: Server, namespace: str, runner: asyncio.Runner) -> Iterator[Any]:
    """Make caches in the namespace of the test: `made(TIMEOUT=5, OPTIONS={"max_bytes": 1000})`."""
    backends = []

    def make(url: str = server.url, **params: Any) -> Any:
        options = {"namespace": namespace, **params.pop("OPTIONS", {})}
        cache = cache_class()(url, {**params, "OPTIONS": options})
        backends.append(cache.cache._backend)
        return cache

    yield make
    for backend in backends:
        runner.run(backend.aclose())


@pytest.fixture(params=["sync", "async"])
def do(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Any:
    """Call a method of a cache, or its asyncio counterpart: `do(cache, "get", "k")`."""

    async def later(cache: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return await getattr(cache, f"a{method}")(*args, **kwargs)

    if request.param == "async":
        return lambda *args, **kwargs: runner.run(later(*args, **kwargs))
    return lambda cache, method, *args, **kwargs: getattr(cache, method)(*args, **kwargs)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that downloads a version of Django, and returns the paths of the package and its tests."""
    found: dict[str, tuple[Path, Path]] = {}

    def source(version: str) -> tuple[Path, Path]:
        if version not in found:
            folder = tmp_path_factory.mktemp("django")
            root = downloads.unpack(folder, f"django=={version}")
            (folder / "lib").mkdir()
            (root / "django").rename(folder / "lib" / "django")
            found[version] = (folder / "lib", root / "tests")
        return found[version]

    return source


def run_suite(paths: tuple[Path, Path], server: Server, backend: str, *labels: str) -> int:
    """Run tests of Django. Return how many passed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    words = [sys.executable, "-W", "default", "-m", "tests.support.django_suite", server.url, backend, *labels]
    done = subprocess.run(
        words, check=False, env=environment, cwd=paths[0], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stderr
    (ran,) = re.findall(r"^Ran (\d+) tests", done.stderr, re.MULTILINE)
    return int(ran)


@pytest.mark.thorough
@pytest.mark.servers("valkey")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.waits
def test_djangos_tests_of_caches_and_sessions_pass(server: Server, sources: Any, version: str) -> None:
    assert run_suite(sources(version), server, BACKEND, CACHE_TESTS, *SESSION_TESTS) == sum(PASSED[version])


@pytest.mark.thorough
@pytest.mark.servers("valkey", "cluster")
def test_djangos_tests_of_caches_pass_through_asyncio(server: Server, sources: Any) -> None:
    version = VERSIONS[-1]
    assert run_suite(sources(version), server, ASYNC_BACKEND, CACHE_TESTS) == PASSED[version][0]


def test_values_and_integers_come_back(do: Any, made: Any) -> None:
    cache = made()
    values = {"int": 5, "big": 2**70, "bool": True, "float": 1.5, "bytes": b"x", "none": None, "set": {1, (2,)}}
    values["object"] = slice(1, 2)
    assert do(cache, "set_many", values) == []
    assert do(cache, "get_many", values) == values
    assert type(do(cache, "get", "bool")) is bool
    assert do(cache, "incr", "int", 3) == 8
    assert do(cache, "decr", "int") == 7
    assert cache.cache.get(":1:int") == 7, "the key is that of Django, and the integer is not pickled"


def test_incr_of_a_missing_or_unfit_value_stores_nothing(do: Any, made: Any) -> None:
    cache = made()
    with pytest.raises(ValueError, match="'n' not found"):
        do(cache, "incr", "n")
    assert do(cache, "get", "n", "nothing") == "nothing"
    do(cache, "set", "n", "text")
    with pytest.raises(NoInteger):
        do(cache, "incr", "n")
    do(cache, "set", "n", 1, timeout=600)
    do(cache, "incr", "n")
    assert cache.cache.ttl(":1:n") == pytest.approx(600, abs=60), "incr keeps the timeout"


def test_timeouts_prefix_and_version_have_djangos_meaning(do: Any, made: Any) -> None:
    cache = made(TIMEOUT=50, KEY_PREFIX="shop", VERSION=3)
    do(cache, "set", "default", 1)
    do(cache, "set", "never", 1, timeout=None)
    do(cache, "set", "century", 1, timeout=100 * 366 * 86_400)
    do(cache, "set", "soon", 1, timeout=0.05)
    do(cache, "set", "gone", 1)
    do(cache, "set", "gone", 2, timeout=0)
    assert do(cache, "add", "gone", 3, timeout=-1) is True
    assert do(cache, "get", "gone") is None
    assert cache.cache.ttl("shop:3:default") == pytest.approx(50, abs=20)
    assert cache.cache.ttl("shop:3:never") == float("inf")
    assert cache.cache.ttl("shop:3:century") > 3e8
    wait_until(lambda: do(cache, "get", "soon") is None, "a timeout of a fraction of a second")
    assert do(cache, "touch", "default", timeout=None) is True
    assert cache.cache.ttl("shop:3:default") == float("inf")
    assert do(cache, "touch", "default", timeout=0) is True
    assert do(cache, "touch", "default", timeout=5) is False
    assert made(TIMEOUT=None).default_timeout is None


def test_value_that_is_too_large_removes_the_older_one(do: Any, made: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache, large = made(), os.urandom(2_000_000)
    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        for method, args in (
            ("set", ("k", large)),
            ("set_many", ({"k": large, "other": 1},)),
            ("add", ("new", large)),
        ):
            do(cache, "set", "k", 1)
            assert do(cache, method, *args) in (None, ["k"], False)
            assert do(cache, "get", "k") == (1 if method == "add" else None)
            assert do(cache, "get", "new") is None
    assert do(cache, "get", "other") == 1
    assert "the value of 'k' is not cached: pickled, it has" in caplog.text
    assert do(cache, "get_or_set", "large", lambda: large) == large
    fits = os.urandom(2**20 - 100)
    do(cache, "set", "k", fits)
    assert do(cache, "get", "k") == fits


def test_full_cache_evicts_the_least_recently_used(do: Any, made: Any) -> None:
    cache = made(OPTIONS={"MAX_ENTRIES": 3, "CULL_FREQUENCY": 2, "strict": True})
    for key in "abc":
        do(cache, "set", key, key)
    assert do(cache, "get", "a") == "a"
    do(cache, "set", "d", "d")
    assert sorted(do(cache, "get_many", "abcd")) == ["a", "c", "d"]


def test_get_or_set_calls_its_function_for_missing_keys_only(do: Any, made: Any) -> None:
    cache, calls = made(), []

    def default() -> object:
        calls.append(1)
        return None

    assert [do(cache, "get_or_set", "k", default) for _ in range(3)] == [None] * 3
    assert len(calls) == 1, "None is a value"
    assert [do(cache, "get_or_set", "k", default, timeout=0) for _ in range(2)] == [None] * 2
    assert len(calls) == 1
    assert [do(cache, "get_or_set", "other", default, timeout=0) for _ in range(2)] == [None] * 2
    assert len(calls) == 3, "a value that expires at once is not stored"
    assert do(cache, "get_or_set", "plain", 5) == do(cache, "get_or_set", "plain", 6) == 5

    def fails() -> object:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        do(cache, "get_or_set", "failed", fails)


def compute_once(url: str, namespace: str, fails: bool) -> Generator[str, None, tuple[Any, int]]:
    """Ask for one missing value. Return the result, and how often this process computed it."""
    cache, calls = cache_class()(url, {"OPTIONS": {"namespace": namespace}}), []
    cache.get("warm")
    yield "ready"

    def default() -> str:
        calls.append(1)
        time.sleep(0.3)
        if fails:
            raise KeyError("mine")
        return "computed"

    try:
        result = cache.get_or_set("k", default)
    except KeyError:
        result = "own error"
    cache.cache._backend.close()
    return result, len(calls)


@pytest.mark.thorough
@pytest.mark.parametrize("fails", [False, True])
def test_get_or_set_computes_once_for_all_processes(
    server: Server, namespace: str, workers: Workers, fails: bool
) -> None:
    started = [workers.start(compute_once, server.url, namespace, fails) for _ in range(4)]
    assert [worker.said() for worker in started] == ["ready"] * 4
    for worker in started:
        worker.answer()
    results = [worker.result() for worker in started]
    assert {result for result, _ in results} == {"own error" if fails else "computed"}
    if not fails:
        assert sum(calls for _, calls in results) == 1


def race(url: str, namespace: str, times: int) -> int:
    """Add keys that other processes also add, and increment `n` each time. Return how many keys this process added."""
    cache = cache_class()(url, {"OPTIONS": {"namespace": namespace}})
    added = 0
    for number in range(times):
        added += cache.add(f"k{number}", 1)
        cache.incr("n")
    cache.cache._backend.close()
    return added


@pytest.mark.thorough
def test_add_and_incr_are_atomic_across_processes(server: Server, namespace: str, workers: Workers, made: Any) -> None:
    cache = made()
    cache.set("n", 0)
    added = workers.run(race, [(server.url, namespace, 300)] * 4)
    assert sum(added) == 300
    assert cache.get("n") == 1200


def test_threads_and_aliases_share_one_connection(made: Any) -> None:
    first, second = made(), made(KEY_PREFIX="other")
    assert first.cache is second.cache
    first.set("k", 1)
    assert second.get("k") is None
    second.clear()
    assert first.get("k") is None, "clear empties the cache, whatever the prefix"


@pytest.mark.thorough
@pytest.mark.servers("valkey")
def test_outage_is_a_miss_where_the_option_says_so(do: Any, made: Any, own_server: Server) -> None:
    lenient = made(own_server.url, OPTIONS={"name": "lenient", "on_unavailable": "miss"})
    exact = made(own_server.url, OPTIONS={"name": "exact"})
    for cache in (lenient, exact):
        do(cache, "set", "k", 1)
    own_server.kill()
    assert do(lenient, "get", "k", "nothing") == "nothing"
    do(lenient, "set", "k", 2)
    assert do(lenient, "add", "k", 2) is False
    assert do(lenient, "get_many", ["k"]) == {}
    assert do(lenient, "set_many", {"k": 2}) == ["k"]
    assert do(lenient, "get_or_set", "k", lambda: 3) == 3
    with pytest.raises(BackendUnavailable):
        do(lenient, "incr", "k")
    with pytest.raises(BackendUnavailable):
        do(exact, "get", "k")
    assert do(exact, "get_or_set", "k", lambda: 3) == 3


@pytest.mark.parametrize(
    ("location", "options", "argument"),
    [
        (["redis://:secret@a", "redis://b"], {}, "LOCATION"),
        ("ftp://x", {}, "url"),
        ("redis://localhost:1", {"MAX_ENTRIES": "many"}, "MAX_ENTRIES"),
        ("redis://localhost:1", {"on_unavailable": "maybe"}, "on_unavailable"),
        ("redis://localhost:1", {"max_entries": 5}, "OPTIONS"),
        ("redis://localhost:1", {"name": ""}, "name"),
        ("redis://localhost:1", {"namespace": "a b"}, "namespace"),
    ],
)
def test_invalid_settings_are_refused(location: Any, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        cache_class()(location, {"OPTIONS": {"name": "refused", **options}})
    assert refused.value.argument == argument
    assert "secret" not in str(refused.value)


def test_cache_without_a_location_follows_the_default_backend(
    do: Any, server: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Django makes the cache object when a program is imported, before any test of the program has a server."""
    with another_default():
        cache = cache_class()("", {})
        early = default_backend()
        with another_default():
            monkeypatch.setenv("AGENTPERF_REDIS_URL", server.url)
            monkeypatch.setenv("AGENTPERF_NAMESPACE", namespace)
            do(cache, "set", "k", 1)
            assert (do(cache, "get", "k"), cache.cache._backend.namespace) == (1, namespace)
        assert cache.cache._backend is early


def test_closed_connection_of_a_cache_is_made_again(do: Any, made: Any, server: Server, namespace: str) -> None:
    cache = made()
    do(cache, "set", "k", 1)
    cache.cache._backend.close()
    assert do(cache, "get", "k") == 1
    cache.cache._backend.close()


def test_other_limits_of_one_cache_are_refused(made: Any) -> None:
    kept = made(OPTIONS={"MAX_ENTRIES": 5})
    with pytest.raises(InvalidArgument, match="max_size is 6"):
        made(OPTIONS={"MAX_ENTRIES": 6})
    assert kept.cache.max_size == 5


def test_new_limits_apply_when_all_objects_of_a_cache_are_gone(made: Any) -> None:
    assert made(OPTIONS={"MAX_ENTRIES": 5}).cache.max_size == 5
    assert made(OPTIONS={"MAX_ENTRIES": 6}).cache.max_size == 6, "as with Django's override_settings"


def test_unpicklable_value_raises(do: Any, made: Any) -> None:
    cache = made()
    do(cache, "set", "k", 1)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        do(cache, "set", "k", lambda: None)
    assert do(cache, "get", "k") == 1
