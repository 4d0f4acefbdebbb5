"""Servers that vanish, come back empty, refuse commands or stall, and the errors that callers get."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import (
    AgentPerfError,
    BackendUnavailable,
    CorruptState,
    InvalidArgument,
    SchemaMismatch,
)
from tests.support.driving import Run, add
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector, hurry

pytestmark = pytest.mark.thorough


def test_concurrent_commands_all_refuse_newer_schema(
    backend: Backend, runner: asyncio.Runner, raw: Raw, namespace: str
) -> None:
    raw.hset(keys.meta(namespace), mapping={"schema": 99, "epoch": "e"})

    async def concurrently() -> list[object]:
        return await asyncio.gather(*(backend.arun(add(namespace)) for _ in range(20)), return_exceptions=True)

    assert {type(each) for each in runner.run(concurrently())} == {SchemaMismatch}
    errors: list[Exception] = []

    def run_once() -> None:
        try:
            backend.run(add(namespace))
        except AgentPerfError as error:
            errors.append(error)

    threads = [threading.Thread(target=run_once) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [SchemaMismatch] * 12
    assert raw.get(f"{namespace}:counter") is None


def test_damaged_schema_raises_corrupt_state(backend: Backend, run: Run, raw: Raw, namespace: str) -> None:
    raw.hset(keys.meta(namespace), mapping={"schema": "abc", "epoch": "e"})
    with pytest.raises(CorruptState) as caught:
        run(backend, add(namespace))
    assert caught.value.key == keys.meta(namespace)


def test_empty_server_is_detected_before_first_command(
    own_server: Server, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(own_server.url)
    seen: list[str] = []
    backend.on_new_epoch(lambda: seen.append("noticed"))
    run(backend, add(namespace))
    own_server.kill()
    own_server.restart()

    def flow() -> Flow[list[str]]:
        yield from add(namespace)
        return list(seen)

    assert run(backend, flow()) == ["noticed"]


def test_new_event_loop_detects_empty_server(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(own_server.url)
    seen: list[str] = []
    backend.on_new_epoch(lambda: seen.append("noticed"))
    assert asyncio.run(backend.arun(add(namespace))) == 1
    own_server.kill()
    own_server.restart()
    assert asyncio.run(backend.arun(add(namespace))) == 1
    assert seen == ["noticed"]


def test_subscribe_only_process_detects_empty_server(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(own_server.url)
    seen: list[str] = []
    gaps: list[str] = []
    backend.on_new_epoch(lambda: seen.append("noticed"))
    backend.run(add(namespace))
    backend.bus.subscribe(f"{namespace}:{{cache:x}}:bus", lambda _: None, lambda: gaps.append("gap"))
    wait_until(lambda: gaps, "the subscription")
    own_server.kill()
    own_server.restart()
    wait_until(lambda: seen == ["noticed"], "the notice")


def test_transport_error_is_raised_in_the_flow(
    proxy: Proxy, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(proxy.url)
    run(backend, add(namespace))
    hurry(backend, 0.2)
    proxy.close_port()
    with pytest.raises(BackendUnavailable):
        run(backend, add(namespace))  # the client notices the outage

    def flow() -> Flow[str]:
        try:
            yield from add(namespace)
        except BackendUnavailable:
            return "raised"
        return "not raised"

    assert run(backend, flow()) == "raised"
    proxy.open_port()


@pytest.mark.parametrize("commands", [1, 1600])
@pytest.mark.parametrize("database", [0, 1])
def test_deadline_holds_for_batches_and_handshakes(
    own_server: Server, connect: Callable[..., Backend], run: Run, commands: int, database: int
) -> None:
    backend = connect(own_server.url.replace("/0", f"/{database}"), deadline=0.5)
    own_server.pause()

    def flow() -> Flow[list[object]]:
        batch = Batch(tuple(Command("ECHO", (str(number),), (), bytes) for number in range(commands)))
        return list((yield from batch.settled()))

    with StallDetector() as stalls:
        start = time.monotonic()
        results = run(backend, flow())
        assert stalls.own(start, time.monotonic()) < 1.5
    own_server.resume()
    assert {type(each) for each in results} == {BackendUnavailable}


def test_deadline_can_be_set_per_command(own_server: Server, connect: Callable[..., Backend], namespace: str) -> None:
    backend = connect(own_server.url)
    backend.run(add(namespace))
    own_server.pause()
    with StallDetector() as stalls:
        start = time.monotonic()
        with pytest.raises(BackendUnavailable):
            backend.run(add(namespace), deadline=0.2)
        assert stalls.own(start, time.monotonic()) < 1.0
    own_server.resume()


def test_stalled_command_does_not_delay_its_pipeline(
    own_server: Server, connect: Callable[..., Backend], runner: asyncio.Runner, namespace: str
) -> None:
    backend = connect(own_server.url, deadline=3.0)
    backend.run(add(namespace))
    with own_server.client() as client:
        client.config_set("min-replicas-to-write", 1)

    async def main() -> bool:
        stalled = asyncio.ensure_future(backend.arun(add(namespace)))
        assert await backend.arun(Command("ECHO", ("hello",), (), bytes)) == b"hello"
        was_stalled = not stalled.done()
        with pytest.raises(BackendUnavailable, match="min-replicas"):
            await stalled
        return was_stalled

    assert runner.run(main())


def test_cluster_works_after_its_seed_died(
    start_server: Callable[..., Server], connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    server = start_server("cluster")
    for node in server.nodes:
        with node.client() as client:
            client.config_set("cluster-require-full-coverage", "no")
    seed, *others = server.nodes
    backend = connect(f"redis+cluster://127.0.0.1:{seed.port}", deadline=10.0)
    names = [f"counter{number}" for number in range(30)]
    for name in names:
        run(backend, add(namespace, 1, name))
    seed.kill()
    answered = 0
    for name in names:
        with_node = [node for node in others if _has(node, f"{namespace}:{name}")]
        if with_node:
            assert run(backend, add(namespace, 1, name)) == 2
            answered += 1
    assert answered > 5


def _has(node: object, key: str) -> bool:
    with node.client() as client:  # type: ignore[attr-defined]  # `node` is a Node
        try:
            return bool(client.exists(key))
        except Exception:  # noqa: BLE001  MOVED: the key is on another node
            return False


@pytest.mark.thorough
def test_unserved_slot_fails_without_delaying_others(
    start_server: Callable[..., Server], connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    server = start_server("cluster")
    for node in server.nodes:
        with node.client() as client:
            client.config_set("cluster-require-full-coverage", "no")
    backend = connect(server.url)
    orphan, healthy = "{orphan}", "{healthy}"
    run(backend, add(namespace, 1, healthy))
    with server.client() as client:
        slot = client.keyslot("{orphan}")
    for node in server.nodes:
        with node.client() as client:
            client.execute_command("CLUSTER", "DELSLOTS", slot)
    hurry(backend, 1.0)
    with StallDetector() as stalls:
        start = time.monotonic()
        with pytest.raises(BackendUnavailable, match="Cluster"):
            run(backend, add(namespace, 1, orphan))
        hurry(backend, 5.0)
        assert run(backend, add(namespace, 1, healthy)) == 2
        assert stalls.own(start, time.monotonic()) < 3.0


@pytest.mark.servers("cluster")
def test_plain_url_to_cluster_error_names_scheme(
    server: Server, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(f"redis://127.0.0.1:{server.port}")
    commands = tuple(add(namespace, 1, f"counter{number}") for number in range(8))

    def flow() -> Flow[list[object]]:
        return list((yield from Batch(commands).settled()))

    errors = [each for each in run(backend, flow()) if isinstance(each, BackendUnavailable)]
    assert errors
    assert all("redis+cluster://" in str(error) for error in errors)


def test_ended_event_loops_are_garbage_collected(backend: Backend, namespace: str) -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await backend.arun(add(namespace))

    for _ in range(5):
        asyncio.run(main())
    gc.collect()
    assert [loop() for loop in loops] == [None] * 5


def test_close_from_thread_closes_loop_connections(
    server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    backend = connect(server.url)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    before = len(raw.client_list())
    asyncio.run_coroutine_threadsafe(backend.arun(add(namespace)), loop).result(10)
    assert len(raw.client_list()) == before + 1
    backend.close()
    wait_until(lambda: len(raw.client_list()) == before, "the connection's end")
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_client_cannot_be_pickled(perf: AgentPerf) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(perf)


def test_busy_process_recovers_after_its_timeouts(
    own_server: Server, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(own_server.url, deadline=8.0)
    run(backend, add(namespace))
    own_server.pause()

    def wait() -> None:
        with contextlib.suppress(BackendUnavailable):
            backend.run(add(namespace), 1.5)

    threads = [threading.Thread(target=wait) for _ in range(40)]
    for thread in threads:
        thread.start()
    with pytest.raises(BackendUnavailable):
        backend.run(add(namespace), 0.3)
    for thread in threads:
        thread.join()
    own_server.resume()
    assert run(backend, add(namespace)) >= 2


# A socket that is interrupted while it opens may cause this warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_neither_crash_nor_deadlock(backend: Backend, namespace: str) -> None:
    """A signal handler raises an exception at a hundred random points, like the handler of Ctrl-C."""

    class Interrupted(BaseException):
        pass

    armed = [False]  # not an Event: an exception inside the lock of an Event would break the test

    def interrupt(*_: object) -> None:
        if armed[0]:
            armed[0] = False  # no second exception while the test handles the first
            raise Interrupted

    other = [0]
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            backend.run(add(namespace, 1, "other"))
            other[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    hits = 0
    end = time.monotonic() + 30.0
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    try:
        while hits < 100 and time.monotonic() < end:
            try:
                while hits < 100 and time.monotonic() < end:
                    armed[0] = True  # in each round, because an `Interrupted` raised in a destructor is lost
                    backend.run(add(namespace))
                    armed[0] = False
            except Interrupted:
                hits += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0, 0)
        signal.signal(signal.SIGALRM, before)
    seen = other[0]
    wait_until(lambda: other[0] > seen + 10, "the other thread to go on")
    stop.set()
    thread.join()
    assert hits == 100
    for _ in range(100):
        backend.run(add(namespace))


def test_invalid_deadline_is_refused() -> None:
    for deadline in (0, -1, float("nan"), True, "5", None):
        with pytest.raises(InvalidArgument, match="deadline"):
            Backend("redis://localhost", deadline=deadline)  # type: ignore[arg-type]  # wrong on purpose
