"""Runs redis-py's own tests of locks against the locks of this library.

The module is the conftest of these tests (see `tests/integration/locks/test_redis_py_suite.py`). It provides their
fixture `r`. In redis-py, a lock is a string key with a token and a TTL. The tests read and change this key with plain
commands. Here, `r` maps these commands to the state of a lock. The locks of `r` raise redis-py's errors.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self

import pytest
import redis
from redis.exceptions import LockError, LockNotOwnedError

from agentperf_redis import AgentPerf
from agentperf_redis import errors as ours
from agentperf_redis.locks import commands
from agentperf_redis.locks.commands import Place

URL = "REDIS_PY_SUITE_URL"
"""The environment variable with the URL of the server."""
FOREIGN_S = 60.0
"""TTL of a lock that another client takes, s."""


class Client:
    """The commands that the tests call on a client."""

    def __init__(self, perf: AgentPerf, raw: Any, *, is_async: bool, decodes: bool = False) -> None:
        self._perf, self._raw, self._is_async, self._decodes = perf, raw, is_async, decodes
        self._endless: set[str] = set()

    def _place(self, name: str) -> Place:
        return Place.of(self._perf.backend.namespace, "lock", name)

    def lock(self, name: str, lock_class: Any = None, sleep: float = 0.1, **options: Any) -> Any:
        """Return a lock of this library. It does not poll, so it has no use for `sleep`."""
        if options.get("timeout") is None:
            self._endless.add(name)
        lock = self._perf.lock(name, **options)
        return AsyncAdapter(lock) if self._is_async else Adapter(lock)

    def _answer(self, value: Any) -> Any:
        """Return a value, or an awaitable of it for asyncio."""
        if not self._is_async:
            return value

        async def answer() -> Any:
            return value

        return answer()

    def _holder(self, name: str) -> str | None:
        tokens = self._raw.zrange(self._place(name).keys.held, 0, -1)
        live = [each for each in tokens if self._left_ms(name, each) > 0]
        return live[0] if live else None

    def _left_ms(self, name: str, token: str) -> int:
        return round(self._perf.backend.run(iter(commands.look(self._place(name), token))).left * 1000)

    def get(self, name: str) -> Any:
        """Return the token of the holder."""
        token = self._holder(name)
        return self._answer(None if token is None else token if self._decodes else token.encode())

    def pttl(self, name: str) -> Any:
        """Return the TTL of the lock; -1 if the lock does not end while its process lives, -2 if the lock is free."""
        token = self._holder(name)
        return self._answer(-2 if token is None else -1 if name in self._endless else self._left_ms(name, token))

    def ttl(self, name: str) -> Any:
        """Return the TTL of the lock, rounded, as `pttl` does."""
        token = self._holder(name)
        left = -2 if token is None else -1 if name in self._endless else round(self._left_ms(name, token) / 1000)
        return self._answer(left)

    def pexpire(self, name: str, ms: int) -> Any:
        """Change the TTL of the lock."""
        token = self._holder(name)
        assert token is not None
        return self._answer(self._perf.backend.run(iter(commands.extend(self._place(name), token, ms / 1000))))

    def set(self, name: str, value: str) -> Any:
        """Take the lock from its holder, as another client would do."""
        place, holder = self._place(name), self._holder(name)
        if holder is not None:
            self._perf.backend.run(iter(commands.release(place, holder)))
        taken = self._perf.backend.run(iter(commands.acquire(place, f"@{value}", ttl=FOREIGN_S, limit=1)))
        assert isinstance(taken, commands.Taken)
        return self._answer(True)


def converted(error: ours.LockError) -> LockError:
    """Return the error of redis-py for an error of this library."""
    kind = LockNotOwnedError if isinstance(error, ours.LockNotOwned) else LockError
    return kind(str(error), lock_name=error.name)


class _Named:
    """The attributes of a lock that the tests read."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.blocking = lock._locking.blocking

    @property
    def local(self) -> SimpleNamespace:
        """The token of the lease, as in redis-py."""
        held = self._lock._locking.newest
        return SimpleNamespace(token=None if held is None else held.token.encode())


class Adapter(_Named):
    """A lock that raises redis-py's errors."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return getattr(self._lock, name)(*args, **kwargs)
            except ours.LockError as error:
                raise converted(error) from error

        return call

    def __enter__(self) -> Self:
        self.__getattr__("__enter__")()
        return self

    def __exit__(self, *error: object) -> None:
        self.__getattr__("__exit__")(*error)


class AsyncAdapter(_Named):
    """An asyncio lock that raises redis-py's errors."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return await getattr(self._lock.aio, name)(*args, **kwargs)
            except ours.LockError as error:
                raise converted(error) from error

        return call

    async def __aenter__(self) -> Self:
        await self.__getattr__("__aenter__")()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.__getattr__("__aexit__")(*error)


def _clients(is_async: bool) -> Iterator[Callable[..., Client]]:
    url = os.environ[URL]
    with AgentPerf(url, namespace=uuid.uuid4().hex) as perf, redis.Redis.from_url(url, decode_responses=True) as raw:
        yield lambda **options: Client(perf, raw, is_async=is_async, decodes=options.get("decode_responses", False))


@pytest.fixture
def make_client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Client]]:
    """Make clients that share a fresh namespace."""
    yield from _clients(request.path.parent.name == "asyncio_suite")


@pytest.fixture
def r(make_client: Callable[..., Client]) -> Client:
    """The client that the tests use."""
    return make_client()


@pytest.fixture
def create_redis(make_client: Callable[..., Client]) -> Callable[..., Any]:
    """Create clients, like the fixture in redis-py's conftest of the asyncio tests."""

    async def create(**options: Any) -> Any:
        client = make_client(**options)
        client.flushall = lambda: client._answer(True)  # type: ignore[attr-defined]  # the namespace is already empty
        return client

    return create


def _get_client(cls: Any, request: pytest.FixtureRequest, **options: Any) -> Client:
    """Return a client, like the function in redis-py's conftest of the blocking tests."""
    make: Callable[..., Client] = request.getfixturevalue("make_client")
    return make(**options)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers of redis-py."""
    config.addinivalue_line("markers", "onlynoncluster: not on a Cluster")


__all__ = ["_get_client", "create_redis", "make_client", "pytest_configure", "r"]
