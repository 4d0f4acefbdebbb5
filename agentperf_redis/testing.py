"""Plugin for pytest: a private server for the tests of programs that use this library.

pytest loads this module automatically wherever the library is installed. The module offers two fixtures:

- `agentperf`: an `AgentPerf` on the private server, in a new namespace for each test. Until the test ends,
  `AgentPerf()` and `LRUCache()` use the same server and namespace, in the tested code and in programs that the test
  starts.
- `agentperf_url`: the URL of the server, the same for the whole session.

The server comes from the extra ``embedded``. It starts for the first test that needs it, and ends with the session,
even if pytest is killed. Each worker of pytest-xdist has its own server. A session that uses neither fixture loads only
the part of the library that this module needs.

A program that makes its `AgentPerf()` while it is imported needs the server before the tests are collected. With
``agentperf_autostart = true`` in the configuration of pytest, the server starts before the collection, and
AGENTPERF_REDIS_URL is its URL during the whole session. Objects made during an import keep their namespace, which all
tests of the session share. Exceptions are caches of Django and dogpile.cache that have no URL: they use the server and
the namespace of the running test.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from agentperf_redis.agentperf import AgentPerf
    from agentperf_redis.embedded import EmbeddedServer

_URL_VARIABLE: Final = "AGENTPERF_REDIS_URL"
_NAMESPACE_VARIABLE: Final = "AGENTPERF_NAMESPACE"

_early_server: pytest.StashKey[EmbeddedServer] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the setting ``agentperf_autostart``, and keep pytest from rewriting this library's modules.

    pytest rewrites the assertions in all modules of a distribution that contains a plugin. This library contains no
    assertions. Still, pytest would compile its 130 modules again in each session in which pytest cannot write its
    bytecode cache, and that takes 0.9 s.
    """
    rewriting = getattr(pluginmanager, "rewrite_hook", None)
    getattr(rewriting, "_must_rewrite", set()).discard(__package__)
    parser.addini(
        "agentperf_autostart",
        "start a private server before the tests are collected, and set AGENTPERF_REDIS_URL to it",
        type="bool",
        default=False,
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Start the server if ``agentperf_autostart`` is set and this process runs tests."""
    runs_tests = hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)
    if runs_tests and config.getini("agentperf_autostart"):
        session = contextlib.ExitStack()
        config.add_cleanup(session.close)
        config.stash[_early_server] = server = session.enter_context(_server(pytest.UsageError))
        session.enter_context(pytest.MonkeyPatch.context()).setenv(_URL_VARIABLE, server.url)


@pytest.fixture(scope="session")
def _agentperf_server(pytestconfig: pytest.Config) -> Iterator[EmbeddedServer]:
    if _early_server in pytestconfig.stash:
        yield pytestconfig.stash[_early_server]
    else:
        with _server(functools.partial(pytest.fail.Exception, pytrace=False)) as server:
            yield server


@pytest.fixture(scope="session")
def agentperf_url(_agentperf_server: EmbeddedServer) -> str:
    """The URL of a private server, which ends with the session."""
    return _agentperf_server.url


@pytest.fixture
def agentperf(_agentperf_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentPerf]:
    """An `AgentPerf` on the private server, in a namespace of this test. It is closed after the test."""
    from agentperf_redis.agentperf import AgentPerf
    from agentperf_redis.backend import another_default, in_use
    from agentperf_redis.embedded import delete_keys

    namespace = f"test-{secrets.token_hex(8)}"
    monkeypatch.setenv(_URL_VARIABLE, _agentperf_server.url)
    monkeypatch.setenv(_NAMESPACE_VARIABLE, namespace)
    with another_default(), AgentPerf(_agentperf_server.url, namespace=namespace) as perf:
        yield perf
    if not in_use(namespace):  # keys in use stay, because an object that the program left open may need them
        delete_keys(_agentperf_server, f"{namespace}:*")


@contextlib.contextmanager
def _server(unavailable: Callable[[str], BaseException]) -> Iterator[EmbeddedServer]:
    from agentperf_redis.backend import close_all
    from agentperf_redis.embedded import private
    from agentperf_redis.errors import BackendUnavailable

    with contextlib.ExitStack() as session:
        try:
            server = session.enter_context(private())
        except BackendUnavailable as error:
            raise unavailable(f"the plugin agentperf_redis.testing has no server: {error.reason}") from None
        yield server
        close_all(server.url)  # objects that the program left open would otherwise try to reach the server at exit
