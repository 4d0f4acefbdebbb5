"""In a long outage, commands fail at once, not at their deadline. Within a second after the outage, they succeed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.errors import BackendUnavailable
from tests.support.driving import Run, add
from tests.support.proxy import Proxy
from tests.support.servers import Server, wait_until
from tests.support.stalls import StallDetector, hurry

pytestmark = pytest.mark.thorough

DEADLINE_S = 1.0


def trip_breaker(backend: Backend, run: Run, namespace: str) -> None:
    """Open the breaker by one command that times out."""
    with pytest.raises(BackendUnavailable):
        run(backend, add(namespace))
    wait_until(lambda: backend._breaker.open, "the breaker to open")


@pytest.mark.thorough
@pytest.mark.parametrize("away", ["paused", "killed"])
def test_open_breaker_fails_fast_and_recovers_quickly(
    own_server: Server, connect: Callable[..., Backend], run: Run, namespace: str, away: str
) -> None:
    backend = connect(own_server.url)
    recovered: list[float] = []
    backend.on_recovery(lambda: recovered.append(time.monotonic()))
    run(backend, add(namespace))
    hurry(backend, DEADLINE_S)
    (own_server.pause if away == "paused" else own_server.kill)()
    trip_breaker(backend, run, namespace)

    with StallDetector() as stalls:
        start = time.monotonic()
        for _ in range(50):
            with pytest.raises(BackendUnavailable, match="fail at once") as caught:
                run(backend, add(namespace))
            assert caught.value.outcome == "not_applied"
        assert stalls.own(start, time.monotonic()) < DEADLINE_S, "fifty callers took less than one deadline"

        (own_server.resume if away == "paused" else own_server.restart)()
        back = time.monotonic()
        wait_until(lambda: recovered, "the recovery")
        assert stalls.own(back, recovered[0]) < 1.0
    hurry(backend, 20.0)
    assert run(backend, add(namespace)) >= 1


def test_retries_survive_outage_shorter_than_deadline(
    proxy: Proxy, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(proxy.url, deadline=10.0)
    run(backend, add(namespace))
    proxy.close_port()
    with pytest.raises(BackendUnavailable):
        backend.run(add(namespace), 0.2)  # a short deadline must not affect commands with a longer deadline
    opened = threading.Timer(1.0, proxy.open_port)
    opened.start()
    assert run(backend, add(namespace)) == 2
    opened.join()


def test_command_in_flight_at_opening_still_succeeds(
    own_server: Server, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(own_server.url)
    run(backend, add(namespace))
    hurry(backend, DEADLINE_S)
    own_server.kill()
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(backend.run(add(namespace), 20.0)))
    waiting.start()
    trip_breaker(backend, run, namespace)
    own_server.restart()
    waiting.join(20.0)
    assert answers == [1]


@pytest.mark.thorough
def test_breaker_refuses_only_the_dead_cluster_node(
    start_server: Callable[..., Server], connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    server = start_server("cluster")
    for node in server.nodes:
        with node.client() as client:
            client.config_set("cluster-require-full-coverage", "no")
    backend = connect(server.url)
    names = [f"counter{number}" for number in range(30)]
    for name in names:
        run(backend, add(namespace, 1, name))
    dead = server.nodes[-1]
    lost = [name for name in names if backend._topology.node_for(f"{namespace}:{name}").port == dead.port]  # type: ignore[union-attr]
    assert lost
    dead.kill()
    hurry(backend, DEADLINE_S)
    with pytest.raises(BackendUnavailable):
        run(backend, add(namespace, 1, lost[0]))
    wait_until(lambda: backend._breaker.open, "the breaker to open")
    hurry(backend, 5.0)
    for name in names:
        if name in lost:
            with pytest.raises(BackendUnavailable, match="fail at once"):
                run(backend, add(namespace, 1, name))
        else:
            assert run(backend, add(namespace, 1, name)) == 2
    server.restart()
    wait_until(lambda: not backend._breaker.open, "the breaker to close")
    assert run(backend, add(namespace, 1, lost[0])) == 1


def test_close_flushes_despite_an_open_breaker(
    proxy: Proxy, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(proxy.url)
    results: list[int] = []
    backend.on_close(lambda: results.append(backend.run(add(namespace), 5.0)))
    run(backend, add(namespace))
    hurry(backend, DEADLINE_S)
    proxy.close_port()
    trip_breaker(backend, run, namespace)
    threading.Timer(0.1, proxy.open_port).start()
    backend.close()
    assert results == [2]
