"""Tests of the dogpile.cache backend "agentperf": dogpile's own tests, and tests of further promises.

The package dogpile.cache contains tests of backends, serializers and mutexes. All of them run here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from tests.support.places import ROOT
from tests.support.servers import Raw, Server, wait_until
from tests.support.workers import Workers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("dogpile") is None, reason="needs the extra dogpile"),
    pytest.mark.servers("valkey", "cluster"),
]

PASSED = 85
"""Number of tests in dogpile.cache 1.5: 24 of backends, run three times; 3 of serializers; 5 of mutexes, run twice."""


def made_region(url: str, space: str, fresh_for: float = 60, **arguments: Any) -> Any:
    """Return a region that uses this library's backend."""
    from dogpile.cache import make_region, register_backend

    register: Any = register_backend
    register("agentperf.tested", "agentperf_redis.integrations.dogpile", "AgentPerfBackend")
    place = {"url": url, "namespace": space}
    return make_region().configure("agentperf.tested", expiration_time=fresh_for, arguments=place | arguments)


@pytest.fixture
def region(server: Server, namespace: str, runner: asyncio.Runner) -> Iterator[Any]:
    """Make regions in the namespace of the test: `region(max_size=5)`."""
    backends = []

    def make(url: str = server.url, **arguments: Any) -> Any:
        made = made_region(**{"url": url, "space": namespace, **arguments})
        backends.append(made.backend._shared.backend())
        return made

    yield make
    for backend in backends:
        runner.run(backend.aclose())


@pytest.mark.thorough
@pytest.mark.servers("valkey")
@pytest.mark.waits
def test_dogpiles_tests_of_backends_serializers_and_mutexes_pass(server: Server, namespace: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", str(ROOT)]
    options += ["-W", "ignore::pytest.PytestUnknownMarkWarning"]  # the mark of dogpile's slow tests is not registered
    environment = {
        **os.environ,
        "DOGPILE_SUITE_URL": server.url,
        "DOGPILE_SUITE_NAMESPACE": namespace,
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-m", "pytest", *options, "tests/support/dogpile_suite.py"]
    done = subprocess.run(words, check=False, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts["passed"] >= PASSED
    assert not counts.keys() & {"skipped", "deselected", "xfailed"}


@pytest.mark.thorough
def test_installed_package_announces_the_backend() -> None:
    from dogpile.cache import make_region

    made = make_region().configure("agentperf", arguments={"url": "redis://localhost:1", "namespace": "announced"})
    assert type(made.backend).__module__ == "agentperf_redis.integrations.dogpile"
    made.backend._shared.backend().close()


def create_once(url: str, namespace: str) -> Generator[str, None, tuple[Any, int]]:
    """Ask for one missing value. Return the result, and how often this process created it."""
    region, calls = made_region(url, namespace), []
    region.get("warm")
    yield "ready"

    def create() -> str:
        calls.append(1)
        time.sleep(0.3)
        return "created"

    result = region.get_or_create("k", create)
    region.backend._shared.backend().close()
    return result, len(calls)


@pytest.mark.thorough
def test_value_is_created_once_for_all_processes(server: Server, namespace: str, workers: Workers) -> None:
    started = [workers.start(create_once, server.url, namespace) for _ in range(4)]
    assert [worker.said() for worker in started] == ["ready"] * 4
    for worker in started:
        worker.answer()
    results = [worker.result() for worker in started]
    assert {result for result, _ in results} == {"created"}
    assert sum(calls for _, calls in results) == 1


def test_runner_on_another_thread_releases_the_mutex(region: Any) -> None:
    made, done = region(fresh_for=0.05), threading.Event()

    def runner(cache: Any, key: str, creator: Any, mutex: Any) -> None:
        def work() -> None:
            try:
                cache.set(key, creator())
            finally:
                mutex.release()
                done.set()

        threading.Thread(target=work).start()

    made.async_creation_runner = runner
    made.set("k", "old")
    wait_until(lambda: not made.get("k"), "the expiry")

    assert made.get_or_create("k", lambda: "new") == "old", "the stale value is returned while the next one is made"

    assert done.wait(30)
    assert made.get("k", ignore_expiration=True) == "new"
    assert not made.backend.get_mutex("k").locked()


def test_backend_drops_values_after_its_expiration_time(server: Server, namespace: str, region: Any) -> None:
    kept = region(name="limited")  # `backend` shares this region's connection, which the fixture closes
    backend = type(kept.backend)({"url": server.url, "namespace": namespace, "name": "limited", "expiration_time": 50})
    backend.set_serialized("k", b"1")
    backend.set_serialized_multi({"a": b"1", "b": b"2"})
    assert [kept.backend._cache.ttl(key) for key in ("k", "a", "b")] == [pytest.approx(50, abs=20)] * 3
    kept.backend.set_serialized("k", b"1")
    assert kept.backend._cache.ttl("k") == float("inf")


def test_value_that_is_too_large_removes_the_older_one(region: Any, caplog: pytest.LogCaptureFixture) -> None:
    made, large = region(), os.urandom(2_000_000)
    calls: list[tuple[Any, tuple[Any, ...]]] = [(made.set, ("k", large)), (made.set_multi, ({"k": large, "other": 1},))]
    for store, args in calls:
        made.set("k", 1)
        with caplog.at_level(logging.WARNING, "agentperf_redis"):
            store(*args)
        assert not made.get("k")
    assert made.get("other") == 1
    assert "the value of 'k' is not cached: serialized, it has" in caplog.text
    assert made.get_or_create("k", lambda: large) == large


def test_mutexes_of_long_and_strange_keys_differ(region: Any) -> None:
    backend = region().backend
    keys = ["x" * 500 + "1", "x" * 500 + "2", "tab\t1", "tab\t2", "\ud800", "plain", ""]
    mutexes = [backend.get_mutex(key) for key in keys]
    assert [mutex.acquire(wait=False) for mutex in mutexes] == [True] * len(keys)
    assert all(backend.get_mutex(key).locked() for key in keys)
    for mutex in mutexes:
        mutex.release()
    assert not any(mutex.locked() for mutex in mutexes)


def test_lost_mutex_does_not_replace_the_result(region: Any, raw: Raw, namespace: str) -> None:
    made = region()

    def create() -> str:
        for key in raw.keys(f"{namespace}:{{lock:*"):
            raw.delete(key)
        return "created"

    assert made.get_or_create("k", create) == "created"
    assert made.get("k") == "created"


def test_mutex_of_the_process_is_dogpiles_own(region: Any) -> None:
    made = region(distributed_lock=False)
    assert made.backend.get_mutex("k") is None
    assert made.get_or_create("k", lambda: 1) == 1
    assert not made.backend.has_lock_timeout()
    assert region(lock_timeout=60).backend.has_lock_timeout()


@pytest.mark.thorough
@pytest.mark.servers("valkey")
def test_outage_is_a_miss_where_the_argument_says_so(region: Any, own_server: Server) -> None:
    lenient = region(own_server.url, name="lenient", on_unavailable="miss")
    exact = region(own_server.url, name="exact")
    for made in (lenient, exact):
        made.set("k", 1)
    held = lenient.backend.get_mutex("held")
    assert held.acquire()
    own_server.kill()
    assert not lenient.get("k")
    lenient.set("k", 2)
    lenient.set_multi({"k": 2})
    lenient.delete("k")
    assert lenient.get_or_create("k", lambda: 3) == 3
    mutex = lenient.backend.get_mutex("k")
    assert mutex.acquire(wait=False)
    assert not mutex.locked()
    mutex.release()
    held.release()
    with pytest.raises(BackendUnavailable):
        exact.get("k")
    with pytest.raises(BackendUnavailable):
        exact.backend.get_mutex("k").acquire(wait=False)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"url": "ftp://x"}, "url"),
        ({"max_size": "many"}, "max_size"),
        ({"on_unavailable": "maybe"}, "on_unavailable"),
        ({"expiration_time": 0}, "expiration_time"),
        ({"lock_timeout": -1}, "timeout"),
        ({"distributed_lock": 1}, "distributed_lock"),
        ({"url": ["redis://a"]}, "url"),
        ({"name": ""}, "name"),
        ({"namespace": "a b"}, "namespace"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        made_region(arguments.pop("url", "redis://localhost:1"), "refused", **arguments)
    assert refused.value.argument == argument


def test_unknown_argument_is_logged(region: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        region(redis_expiration_time=5, host="localhost")
    assert "does not know: host, redis_expiration_time" in caplog.text


def test_configuration_file_sets_the_arguments(server: Server, namespace: str) -> None:
    from dogpile.cache import make_region

    settings = {"backend": "agentperf.tested", "arguments.url": server.url, "arguments.namespace": namespace}
    settings |= {"arguments.max_size": "5", "expiration_time": "60"}
    # This call only registers agentperf.tested.
    made_region(server.url, namespace).backend._shared.backend().close()
    made = make_region().configure_from_config({f"cache.{key}": value for key, value in settings.items()}, "cache.")
    made.set("k", 1)
    assert (made.get("k"), made.backend._cache.max_size) == (1, 5)
    made.backend._shared.backend().close()
