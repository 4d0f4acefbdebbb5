"""Tests of the blocking and the asyncio driver on real servers, with and without faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.background import Background
from agentperf_redis.command import Batch, Call, Command, Flow, Pause, Shielded, Together, Wait, WakeUp
from agentperf_redis.errors import (
    AgentPerfError,
    BackendFull,
    BackendUnavailable,
    CorruptState,
    SchemaMismatch,
)
from tests.support.driving import Run, add
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector, hurry


def test_script_unknown_to_server_still_runs(backend: Backend, run: Run, raw: Raw, namespace: str) -> None:
    for node in [raw] if not hasattr(raw, "get_primaries") else raw.get_primaries():
        raw.execute_command("SCRIPT", "FLUSH", **({} if node is raw else {"target_nodes": node}))
    assert run(backend, add(namespace, 5)) == 5
    assert run(backend, add(namespace, 2)) == 7
    assert raw.get(f"{namespace}:counter") == "7"


def test_batch_over_many_slots_keeps_its_order(backend: Backend, run: Run, namespace: str) -> None:
    def flow() -> Flow[list[int]]:
        return (yield from Batch(tuple(add(namespace, i, f"counter{i}") for i in range(1, 1300))))

    assert run(backend, flow()) == list(range(1, 1300))


def test_commands_of_one_tick_share_a_pipeline(
    backend: Backend, runner: asyncio.Runner, raw: Raw, namespace: str
) -> None:
    async def main() -> None:
        await backend.arun(add(namespace))
        results = await asyncio.gather(*(backend.arun(add(namespace)) for _ in range(200)))
        assert sorted(results) == list(range(2, 202))

    before = raw.info("stats")["total_reads_processed"]
    runner.run(main())
    reads = raw.info("stats")["total_reads_processed"] - before
    assert reads < 60, "200 commands of one tick must not be 200 packets"


def test_many_threads_share_one_backend(backend: Backend, raw: Raw, namespace: str) -> None:
    def work() -> None:
        for _ in range(50):
            backend.run(add(namespace))

    threads = [threading.Thread(target=work) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raw.get(f"{namespace}:counter") == "2000"


@pytest.mark.parametrize("fault", ["reset_before_request", "reset_after_reply", "half_reply"])
def test_broken_exchange_is_retried(
    fault: str, proxy: Proxy, connect: Callable[..., Backend], run: Run, raw: Raw, namespace: str
) -> None:
    backend = connect(proxy.url)
    run(backend, add(namespace, 0))
    broken = getattr(proxy, fault)(only="EVALSHA")
    result = run(backend, add(namespace))
    broken.wait()
    # The script is not idempotent, so the count shows how often the server executed it.
    assert result == int(raw.get(f"{namespace}:counter") or 0) == (1 if fault == "reset_before_request" else 2)


def test_command_succeeds_after_all_connections_broke(
    proxy: Proxy, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(proxy.url)
    for _ in range(3):
        assert run(backend, add(namespace, 0)) == 0
        proxy.cut()


def test_deadline_holds_against_an_unresponsive_server(
    proxy: Proxy, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(proxy.url)
    run(backend, add(namespace, 0))
    hurry(backend, 0.6)
    proxy.go_silent()
    with StallDetector() as stalls:
        start = time.monotonic()
        with pytest.raises(BackendUnavailable) as caught:
            run(backend, add(namespace))
        assert stalls.own(start, time.monotonic()) < 1.5
    assert caught.value.outcome == "unknown"
    proxy.speak_again()

    def answered() -> bool:
        with contextlib.suppress(BackendUnavailable):  # the breaker refuses commands until a probe succeeds
            return run(backend, add(namespace, 0)) in (0, 1)
        return False

    wait_until(answered, "the next answer")


def test_unreachable_server_error_comes_in_time_with_advice(connect: Callable[..., Backend], run: Run) -> None:
    backend = connect("redis://me:hunter2@127.0.0.1:1/0", deadline=0.3)
    with StallDetector() as stalls:
        start = time.monotonic()
        with pytest.raises(BackendUnavailable) as caught:
            run(backend, add("x"))
        assert stalls.own(start, time.monotonic()) < 1.0
    assert caught.value.outcome == "not_applied"
    assert "redis://me:***@127.0.0.1:1/0" in str(caught.value)
    assert "agentperf up" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.privileged
def test_wrong_password_fails_at_once(
    connect: Callable[..., Backend], start_server: Callable[..., Server], run: Run
) -> None:
    server = start_server("valkey")
    with server.client() as client:
        client.config_set("requirepass", "right")
    try:
        with StallDetector() as stalls:
            start = time.monotonic()
            with pytest.raises(BackendUnavailable, match="WRONGPASS"):
                run(connect(server.url.replace("redis://", "redis://:wrong@")), add("x"))
            with pytest.raises(BackendUnavailable, match="password"):
                run(connect(server.url), add("x"))
            assert stalls.own(start, time.monotonic()) < 2.0
        assert run(connect(server.url.replace("redis://", "redis://:right@")), add("x")) == 1
    finally:
        server.client(password="right").config_set("requirepass", "")


def test_wrong_type_error_names_key_and_writes_nothing(backend: Backend, run: Run, raw: Raw, namespace: str) -> None:
    raw.set(keys.meta(namespace), "not a hash")
    with pytest.raises(CorruptState) as caught:
        run(backend, add(namespace))
    assert caught.value.key == f"{namespace}:meta"
    assert raw.get(f"{namespace}:counter") is None
    raw.delete(keys.meta(namespace))


def test_newer_schema_is_refused_and_unchanged(backend: Backend, run: Run, raw: Raw, namespace: str) -> None:
    raw.hset(keys.meta(namespace), mapping={"schema": 99, "epoch": "e"})
    with pytest.raises(SchemaMismatch, match="99"):
        run(backend, add(namespace))
    assert raw.get(f"{namespace}:counter") is None
    assert raw.hgetall(keys.meta(namespace)) == {"schema": "99", "epoch": "e"}


def test_full_server_raises_until_memory_is_freed(
    own_server: Server, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(own_server.url)
    run(backend, add(namespace))
    with own_server.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(BackendFull):
            run(backend, add(namespace))
        client.config_set("maxmemory", 0)
    assert run(backend, add(namespace)) == 2


def test_command_waits_for_a_paused_server(
    own_server: Server, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(own_server.url, deadline=10.0)
    run(backend, add(namespace, 0))
    own_server.pause()
    threading.Timer(0.7, own_server.resume).start()
    assert run(backend, add(namespace)) >= 1


def test_empty_restarted_server_has_new_epoch(
    own_server: Server, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(own_server.url)
    seen: list[str] = []
    backend.on_new_epoch(lambda: seen.append("new"))

    def enter() -> Flow[list[str]]:
        yield from backend.enter("lb", "planner")
        return (yield from backend.entered("lb"))

    assert run(backend, enter()) == ["planner"]
    own_server.kill()
    own_server.restart()
    assert run(backend, add(namespace)) == 1
    assert run(backend, add(namespace)) == 2
    assert seen == ["new"]
    assert run(backend, enter()) == ["planner"], "resources are recorded again under the new epoch"


def test_forked_child_uses_its_own_connections(backend: Backend, raw: Raw, namespace: str) -> None:
    backend.run(add(namespace))
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            backend.run(add(namespace))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    children = []
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    for _ in range(20):
                        backend.run(add(namespace, 1, "children"))
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert codes == [0] * 10
    assert raw.get(f"{namespace}:children") == "200"


def test_cancelled_flow_still_runs_its_cleanup(
    backend: Backend, runner: asyncio.Runner, raw: Raw, namespace: str
) -> None:
    def hold() -> Flow[None]:
        yield from add(namespace, 1)
        try:
            yield from Pause(60.0)
        finally:
            yield from add(namespace, -1)

    async def main() -> None:
        await backend.arun(add(namespace, 0))
        task = asyncio.ensure_future(backend.arun(hold()))
        while (await backend.arun(add(namespace, 0))) != 1:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # a second cancellation must not stop the cleanup of the flow
        with pytest.raises(asyncio.CancelledError):
            await task

    runner.run(main())
    wait_until(lambda: raw.get(f"{namespace}:counter") == "0", "the flow's end")


def test_wake_up_at_the_same_time_drops_no_cancellation(backend: Backend, runner: asyncio.Runner) -> None:
    async def wake_and_cancel() -> None:
        wake_up = WakeUp()

        def wait() -> Flow[bool]:
            return (yield from Wait(wake_up, 60.0))

        waiting = asyncio.create_task(backend.arun(wait()))
        await asyncio.sleep(0.01)
        wake_up.send()
        asyncio.get_running_loop().call_soon(waiting.cancel)
        with pytest.raises(asyncio.CancelledError):
            await waiting

    runner.run(wake_and_cancel())


def test_cancellation_at_any_step_never_mixes_replies(backend: Backend, runner: asyncio.Runner, namespace: str) -> None:
    async def echo(text: str) -> bytes:
        return await backend.arun(Command("ECHO", (text,), (), bytes))

    async def main() -> None:
        await echo("warm")
        for steps in range(60):
            task = asyncio.ensure_future(echo(f"cancelled{steps}"))
            for _ in range(steps % 12):
                await asyncio.sleep(0)
            task.cancel()
            assert await echo(f"next{steps}") == f"next{steps}".encode()
            await asyncio.gather(task, return_exceptions=True)

    runner.run(main())


def test_each_event_loop_uses_its_own_connections(backend: Backend, namespace: str) -> None:
    for expected in (1, 2, 3):
        assert asyncio.run(backend.arun(add(namespace))) == expected


def test_closed_loops_leave_no_connections(server: Server, connect: Callable[..., Backend], namespace: str) -> None:
    backend = connect(server.url)
    with server.client() as client:

        def connections() -> int:
            return len([each for each in client.client_list() if each["id"] not in before])

        before = {each["id"] for each in client.client_list()}
        for _ in range(20):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(backend.arun(add(namespace)))
            loop.close()
        assert connections() <= 1, "only the connection of the last loop, which the next loop would close"
        assert client.get(f"{namespace}:counter") == "20"


@pytest.mark.standalone
def test_lost_idle_connection_is_replaced_silently(
    server: Server, connect: Callable[..., Backend], runner: asyncio.Runner, namespace: str
) -> None:
    backend = connect(server.url)

    async def main() -> None:
        for number in range(1, 6):
            assert await backend.arun(add(namespace)) == number
            (executor,) = backend._async_executors.values()
            (stack,) = executor._connections._idle.values()
            writer = stack[-1]._writer
            assert writer is not None
            writer.transport.abort()  # imitates a connection reset that the event loop has noticed
            if number % 2:
                await asyncio.sleep(0)

    runner.run(main())


def test_closed_backend_refuses_commands(connect: Callable[..., Backend], server: Server, run: Run) -> None:
    backend = connect(server.url)
    backend.close()
    with pytest.raises(BackendUnavailable, match="closed"):
        run(backend, add("x"))
    backend.close()


def test_close_runs_callbacks_before_disconnecting(
    connect: Callable[..., Backend], server: Server, raw: Raw, namespace: str
) -> None:
    done: list[int] = []
    backend = connect(server.url)
    backend.on_close(lambda: done.append(backend.run(add(namespace, 7))))
    backend.close()
    assert raw.get(f"{namespace}:counter") == "7"


def test_close_on_another_thread_waits_for_the_running_callbacks(
    connect: Callable[..., Backend], server: Server, raw: Raw, namespace: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go_on.wait(30)
        backend.run(add(namespace))

    backend = connect(server.url)
    backend.on_close(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(backend.close)
        assert begun.wait(30)
        second = pool.submit(backend.close)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        go_on.set()
        first.result(30)
        second.result(30)
    assert raw.get(f"{namespace}:counter") == "1", "the connections were open, and the callback ran once"


def test_background_job_that_closes_does_not_wait_for_the_close_that_waits_for_it(
    connect: Callable[..., Backend], server: Server, raw: Raw, namespace: str
) -> None:
    backend = connect(server.url)
    jobs = Background("test")
    begun = threading.Event()

    def close_by_job() -> None:
        begun.set()
        assert go_on.wait(30)
        backend.close()

    def end_jobs() -> None:
        go_on.set()
        assert jobs.close(30), "the jobs are done"

    go_on = threading.Event()
    backend.on_close(end_jobs)
    jobs.put(close_by_job)
    jobs.put(lambda: backend.run(add(namespace)))
    assert begun.wait(30)
    backend.close()
    assert raw.get(f"{namespace}:counter") == "1", "the connections were open until the last job"


@pytest.mark.parametrize("times", [1, 5])
def test_interrupted_close_is_continued(
    connect: Callable[..., Backend], server: Server, raw: Raw, namespace: str, times: int
) -> None:
    interruptions = [SystemExit() for _ in range(times)]
    order: list[str] = []

    def interrupted() -> None:
        order.append("interrupted")
        backend.close()  # as a signal handler may do; the interrupted call continues
        if interruptions:
            raise interruptions.pop()
        backend.run(add(namespace))

    backend = connect(server.url)
    backend.on_close(lambda: order.append("first"))
    backend.on_close(interrupted)
    backend.on_close(lambda: order.append("last"))
    for _ in range(times):
        with pytest.raises(SystemExit):
            backend.close()
    backend.close()
    assert order == ["last", *["interrupted"] * (times + 1), "first"]
    assert raw.get(f"{namespace}:counter") == "1"
    with pytest.raises(BackendUnavailable, match="closed"):
        backend.run(add(namespace))


def test_flow_can_catch_errors_of_commands(backend: Backend, run: Run, raw: Raw, namespace: str) -> None:
    raw.rpush(f"{namespace}:list", "x")

    def flow() -> Flow[str]:
        try:
            yield from add(namespace, 1, "list")
        except AgentPerfError as error:
            return type(error).__name__
        return "none"

    assert run(backend, flow()) == "CorruptState"


around: ContextVar[str] = ContextVar("around", default="nothing")


def test_call_runs_in_context_of_its_flow(backend: Backend, run: Run) -> None:
    def flow() -> Flow[tuple[str, str]]:
        around.set("the flow")
        seen = yield Call(around.get)
        around.set("nothing")
        return seen, (yield Call(around.get))

    assert run(backend, flow()) == ("the flow", "nothing")


def test_error_of_call_keeps_its_traceback(backend: Backend, run: Run) -> None:
    def fail() -> None:
        raise KeyError("no such thing")

    def flow() -> Flow[None]:
        yield Call(fail)

    with pytest.raises(KeyError) as raised:
        run(backend, flow())
    assert raised.traceback[-1].name == "fail"
    assert raised.value.__context__ is None


def test_blocking_call_may_raise_stop_iteration(backend: Backend) -> None:
    def flow() -> Flow[str]:
        try:
            yield Call(iter(()).__next__)
        except StopIteration:
            return "seen"
        return "nothing"

    assert backend.run(flow()) == "seen"


def test_only_asyncio_driver_awaits_call_results(backend: Backend, runner: asyncio.Runner) -> None:
    async def later() -> int:
        return 5

    def flow() -> Flow[Any]:
        return (yield Call(later))

    assert runner.run(backend.arun(flow())) == 5
    unawaited = backend.run(flow())
    assert asyncio.iscoroutine(unawaited)
    unawaited.close()


def test_call_may_use_the_same_backend(backend: Backend, run: Run, namespace: str) -> None:
    is_async = run(backend, _is_async())

    def flow() -> Flow[int]:
        total: int = yield Call(lambda: (backend.arun if is_async else backend.run)(add(namespace, 3)))
        return total

    assert run(backend, flow()) == 3


def _is_async() -> Flow[bool]:
    async def awaited() -> bool:
        return True

    answer = yield Call(awaited)
    if answer is not True:
        answer.close()
    return answer is True


def test_cancelled_call_lets_the_flow_clean_up(
    backend: Backend, runner: asyncio.Runner, raw: Raw, namespace: str
) -> None:
    seen: list[str] = []

    def flow() -> Flow[None]:
        try:
            yield Call(lambda: asyncio.sleep(60))
        except asyncio.CancelledError as error:
            seen.append(str(error))
            yield from add(namespace)
            raise

    async def main() -> None:
        await backend.arun(add(namespace, 0))
        task = asyncio.ensure_future(backend.arun(flow()))
        await asyncio.sleep(0)
        task.cancel("enough")
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task
        assert task.cancelled()

    runner.run(main())
    assert seen == ["enough"]
    wait_until(lambda: raw.get(f"{namespace}:counter") == "1", "the flow's end")


def test_shielded_flow_outlives_its_cancelled_caller(
    backend: Backend, runner: asyncio.Runner, raw: Raw, namespace: str
) -> None:
    holds, ended = asyncio.Event(), asyncio.Event()

    def shielded() -> Flow[str]:
        yield from add(namespace)
        yield Call(holds.wait)
        yield from add(namespace)
        ended.set()
        return "not for the caller"

    def flow() -> Flow[str]:
        return (yield from Shielded(shielded()))

    async def main() -> None:
        task = asyncio.ensure_future(backend.arun(flow()))
        while (await backend.arun(add(namespace, 0))) != 1:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        holds.set()
        await asyncio.wait_for(ended.wait(), 20)

    runner.run(main())
    assert raw.get(f"{namespace}:counter") == "2"


def test_shielded_flow_returns_and_raises_normally(backend: Backend, run: Run, namespace: str) -> None:
    def inner(amount: int) -> Flow[int]:
        total = yield from add(namespace, amount)
        if total > 5:
            raise ValueError(total)
        return total

    def flow() -> Flow[tuple[int, str]]:
        first = yield from Shielded(inner(5))
        try:
            yield from Shielded(inner(1))
        except ValueError as error:
            return first, str(error)
        return first, "nothing"

    assert run(backend, flow()) == (5, "6")


def test_concurrent_flows_have_separate_contexts(backend: Backend, run: Run, namespace: str) -> None:
    seen: list[str] = []

    def each(number: int) -> Flow[None]:
        seen.append(around.get())
        around.set(f"{number}")
        yield from add(namespace)
        while (yield from add(namespace, 0)) < 10:  # wait until all ten flows have added 1
            yield from Pause(0.001)
        assert around.get() == f"{number}"

    def flow() -> Flow[str]:
        around.set("outside")
        yield from Together(tuple(each(number) for number in range(10)), "test")
        return around.get()

    assert run(backend, flow()) == "outside"
    assert seen == ["outside"] * 10


def test_first_error_of_concurrent_flows_is_raised(backend: Backend, run: Run) -> None:
    def fail() -> Flow[None]:
        yield from Pause(0.0)
        raise KeyError("no such thing")

    def idle() -> Flow[None]:
        yield from Pause(0.01)

    def flow() -> Flow[None]:
        yield from Together((idle(), fail(), idle()), "test")

    with pytest.raises(KeyError):
        run(backend, flow())


def test_closed_backend_still_runs_local_steps(
    connect: Callable[..., Backend], server: Server, run: Run, namespace: str
) -> None:
    backend = connect(server.url)
    backend.close()

    def flow() -> Flow[int]:
        with pytest.raises(BackendUnavailable, match="closed"):
            yield from add(namespace)
        total: int = yield Call(lambda: 5)
        return total

    assert run(backend, flow()) == 5
