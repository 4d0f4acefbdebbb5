"""A server that sends garbled replies causes documented errors within the deadline, and no other errors."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.errors import AgentPerfError, BackendUnavailable

PIECES = [
    *(b"+OK\r\n", b"-ERR x\r\n", b"-NOSCRIPT x\r\n", b"-MOVED 1 127.0.0.1:1\r\n", b"-ASK 1 h:x\r\n", b"-LOADING\r\n"),
    *(b":1\r\n", b":x\r\n", b"$3\r\nabc\r\n", b"$-1\r\n", b"$-7\r\n", b"$5\r\nab", b"*2\r\n", b"*-1\r\n", b"*-3\r\n"),
    *(b"%1\r\n", b"_\r\n", b",nan\r\n", b"#t\r\n", b"\xff\xfe\r\n", b"\r\n", b"*1\r\n:5\r\n", b"!3\r\nerr\r\n"),
    *(b">2\r\n$1\r\na\r\n:1\r\n", b"~1\r\n*1\r\n:1\r\n", b"=7\r\ntxt:abc\r\n", b"(9999999999999999999999\r\n"),
]
SERVERS = 1
DEADLINE_S = 0.3
ENDS_S = 60.0
"""Time within which a call ends, even on a busy machine."""


@contextlib.contextmanager
def garbling_server(source: random.Random, pieces: Sequence[bytes] = PIECES) -> Iterator[int]:
    """Run a server that answers every request with random pieces of replies. Yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65_536):
                connection.sendall(b"".join(source.choices(pieces, k=source.randrange(1, 6))))
                if source.random() < 0.2:
                    return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def calls(perf: AgentPerf) -> list[tuple[Callable[[], Any], Callable[[], Awaitable[Any]]]]:
    """Return calls of all services, each in its blocking and its asyncio form."""
    cache, local, balancer = perf.cache("c"), perf.cache("l", local_size=5), perf.balancer()
    lock = perf.lock("l", blocking_timeout=0.01)
    return [
        (lambda: cache.get("k"), lambda: cache.aio.get("k")),
        (lambda: local.put("k", 1), lambda: local.aio.put("k", 1)),
        (lambda: balancer.acquire("p", wait=0.01), lambda: balancer.aio.acquire("p", wait=0.01)),
        (perf.metrics.snapshots, perf.metrics.aio.snapshots),
        (perf.alerts.list, perf.alerts.aio.list),
        (lock.acquire, lock.aio.acquire),
    ]


def test_reply_that_cannot_be_read_is_an_outage(runner: asyncio.Runner) -> None:
    """hiredis raises a TypeError for a map whose key is a list. Only RESP3 has maps."""
    with garbling_server(random.Random(1), [b"%1\r\n*1\r\n:1\r\n:1\r\n"]) as port:
        perf = AgentPerf(f"redis://127.0.0.1:{port}", namespace="g", deadline=0.1)
        cache = perf.cache("c")
        with pytest.raises(BackendUnavailable):
            cache.get("k")
        with pytest.raises(BackendUnavailable):
            runner.run(_result(lambda: cache.aio.get("k")))
        runner.run(perf.aclose())


@pytest.mark.filterwarnings("ignore")  # warnings about flushes that fail
@pytest.mark.thorough
def test_garbled_replies_cause_only_documented_errors(runner: asyncio.Runner) -> None:
    wrong, slow = [], []
    for number in range(SERVERS):
        with garbling_server(random.Random(number)) as port:
            for scheme in ("redis", "redis+cluster"):
                perf = AgentPerf(f"{scheme}://127.0.0.1:{port}", namespace="g", deadline=DEADLINE_S)
                for blocking, awaited in calls(perf):
                    for call in (blocking, lambda awaited=awaited: runner.run(_result(awaited))):
                        began = time.monotonic()
                        try:
                            call()
                        except AgentPerfError:
                            pass
                        except Exception as error:  # noqa: BLE001  such an error is what this test looks for
                            wrong.append(f"{number} {scheme}: {type(error).__name__}: {error}")
                        if time.monotonic() > began + ENDS_S:
                            slow.append(f"{number} {scheme}: {time.monotonic() - began} s")
                runner.run(perf.aclose())
    assert (wrong, slow) == ([], [])


async def _result(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()
