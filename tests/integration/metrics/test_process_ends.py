"""No count is lost at the end of a process that the standard library started, nor at SIGTERM with `flush_on_sigterm`.

The file tests/borders/test_process_ends.py makes the same check for workers and web servers of other packages.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial

import pytest

from tests.support.programs import LIMIT_S, Programs
from tests.support.proxy import Proxy
from tests.support.servers import wait_until
from tests.support.stalls import StallDetector

pytestmark = pytest.mark.thorough

COUNT = 20
SLACK_S = 3.0
"""Time that a busy machine may add to an upper bound, s."""

POOLS = """
    import multiprocessing, os
    from concurrent.futures import ProcessPoolExecutor
    from agentperf_redis import AgentPerf

    perf = AgentPerf(flush_on_sigterm={flush_on_sigterm})

    def work(number):
        with perf.metrics.track("worker"):
            return number

    if __name__ == "__main__":
        context = multiprocessing.get_context({method!r})
        {use}
"""
USES = {
    "Process": """
        for process in [context.Process(target=work, args=(number,)) for number in range(20)]:
            process.start()
            process.join()
        """,
    "Pool, close and join": """
        pool = context.Pool(2, maxtasksperchild=7)
        assert pool.map(work, range(20), chunksize=1) == list(range(20))
        pool.close()
        pool.join()
        """,
    "ProcessPoolExecutor": """
        with ProcessPoolExecutor(2, mp_context=context) as executor:
            assert list(executor.map(work, range(20))) == list(range(20))
        """,
    "with Pool": """
        with context.Pool(2) as pool:
            assert pool.map(work, range(20), chunksize=1) == list(range(20))
        pool.join()
        """,
}


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("spawn", "forkserver"))]
)
@pytest.mark.parametrize("use", USES)
def test_worker_processes_flush_at_their_end(
    programs: Programs, counted: Callable[[], int], use: str, method: str
) -> None:
    """Only `with Pool` ends its workers with SIGTERM, so only this case needs `flush_on_sigterm`."""
    needs = use == "with Pool"
    programs.write("pools.py", POOLS.format(use=USES[use].strip(), method=method, flush_on_sigterm=needs))
    programs.run("pools")
    assert counted() == COUNT, programs.log()


def test_child_of_a_forkserver_that_preloads_the_library_flushes(
    programs: Programs, counted: Callable[[], int]
) -> None:
    """The child imports the main module. Then multiprocessing drops the finalizers that the import registered."""
    programs.write(
        "preloaded.py",
        """
        import multiprocessing
        from agentperf_redis import AgentPerf

        collector = AgentPerf().metrics

        def work():
            collector.record_execution("worker", 0.1, True)

        if __name__ == "__main__":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["agentperf_redis.process_end"])
            for _ in range(3):
                process = context.Process(target=work)
                process.start()
                process.join()
        """,
    )
    programs.run("preloaded")
    assert counted() == 3, programs.log()


def test_young_child_flushes_early(programs: Programs, counted: Callable[[], int]) -> None:
    """The first record of a child is sent long before the flush interval of a minute is over."""
    programs.write(
        "young.py",
        """
        import os, time
        from agentperf_redis import MetricsCollector

        collector = MetricsCollector(flush_every=60.0)
        if os.fork() == 0:
            collector.record_execution("worker", 0.1, True)
            time.sleep(100)
        os.wait()
        """,
    )
    program = programs.start("young")
    wait_until(lambda: counted() == 1, "the first flush of the child")
    assert program.poll() is None


def test_first_flush_imports_no_module(programs: Programs) -> None:
    """If a process forks while its flushing thread imports a module, the lock of the module stays held in the child.

    The first flush of the child would then wait for the lock without end.
    """
    programs.write(
        "first.py",
        """
        import sys
        from agentperf_redis import MetricsCollector

        collector = MetricsCollector()
        collector.record_execution("worker", 0.1, True)
        before = set(sys.modules)
        assert collector.flush()
        print(sorted(set(sys.modules) - before))
        """,
    )
    programs.run("first")
    assert programs.log() == "[]\n"


def test_own_child_flushes_before_os_exit(programs: Programs, counted: Callable[[], int]) -> None:
    """`os._exit` runs no exit handler, so the data since the last flush would be lost."""
    programs.write(
        "own.py",
        """
        import os
        from agentperf_redis import MetricsCollector

        collector = MetricsCollector()
        for flushes in (True, False):
            if os.fork() == 0:
                collector.record_execution("worker", 0.1, True)
                assert not flushes or collector.flush()
                os._exit(0)
            os.wait()
        """,
    )
    programs.run("own")
    assert counted() == 1


def test_child_takes_up_the_flush_interval(programs: Programs) -> None:
    programs.write(
        "rhythm.py",
        """
        import os, time, warnings
        from agentperf_redis import MetricsCollector

        collector = MetricsCollector(flush_every=0.4)
        collector.record_execution("worker", 0.1, True)
        assert collector.flush()
        intervals = []
        flusher = collector._flusher
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: a process with threads forks
        if os.fork() == 0:
            for _ in range(6):
                intervals.append(round(flusher._rhythm(), 3))
                flusher._flush_due()
            print(*intervals, flush=True)
            os._exit(0)
        os.wait()
        print(round(flusher._rhythm(), 3), flush=True)
        """,
    )
    programs.run("rhythm")
    assert programs.log().splitlines() == ["0.05 0.1 0.2 0.4 0.4 0.4", "0.4"]


PROGRAM = """
    import asyncio, os, signal, sys, threading, time
    from agentperf_redis import AgentPerf

    {before}
    perf = AgentPerf(deadline=1000.0, flush_on_sigterm={flush_on_sigterm})
    collector = perf.metrics

    def record(count=1):
        for _ in range(count):
            collector.record_execution("worker", 0.1, True)

    record()
    assert collector.flush()
    {then}
"""
UNTIL_KILLED = """
    record(19)
    print("ready", flush=True)
    while True:
        time.sleep(100)
"""


def start(
    programs: Programs, then: str, *, before: str = "", flush_on_sigterm: bool = True, url: str | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that records, and return it when it has printed `ready`."""
    shift = partial(re.sub, "^    ", "", flags=re.MULTILINE)
    source = shift(PROGRAM).format(before=shift(before), then=shift(then), flush_on_sigterm=flush_on_sigterm)
    programs.write("program.py", source)
    program = programs.start("program", url=url)
    wait_until(lambda: programs.said("ready") or program.poll() is not None, "the program to be ready")
    assert program.poll() is None, programs.log()
    return program


def test_sigterm_flushes_and_ends_the_process(programs: Programs, counted: Callable[[], int]) -> None:
    program = start(programs, UNTIL_KILLED)
    program.terminate()
    assert program.wait(LIMIT_S) == -signal.SIGTERM
    assert counted() == COUNT


def test_sigterm_during_close_waits_for_the_last_flush(programs: Programs, counted: Callable[[], int]) -> None:
    then = """
    flusher = collector._flusher
    flush_last, end_jobs = flusher._flush_last, flusher._jobs.close
    told = threading.Event()

    def flush_late():
        told.wait()
        time.sleep(0.2)
        flush_last()

    def end_after_signal(timeout):
        if not told.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            told.set()
        return end_jobs(timeout)

    flusher._flush_last, flusher._jobs.close = flush_late, end_after_signal
    record(19)
    print("ready", flush=True)
    perf.close()
    while True:
        time.sleep(100)
    """
    program = start(programs, then)
    assert program.wait(LIMIT_S) == -signal.SIGTERM
    assert counted() == COUNT


def test_sigterm_without_the_option_loses_pending_records(programs: Programs, counted: Callable[[], int]) -> None:
    slow = "from agentperf_redis import MetricsCollector; MetricsCollector(backend=perf.backend, flush_every=60)"
    program = start(programs, slow + UNTIL_KILLED, flush_on_sigterm=False)
    program.terminate()
    assert program.wait(LIMIT_S) == -signal.SIGTERM
    assert counted() == 1


def test_sigterm_calls_the_former_handler_once_per_signal(programs: Programs, counted: Callable[[], int]) -> None:
    before = """
    calls = []

    def former(number, frame):
        calls.append((number, collector.delivery().pending))
        print("call", len(calls), flush=True)

    signal.signal(signal.SIGTERM, former)
    """
    then = """
    record(19)
    print("ready", flush=True)
    while len(calls) < 2:
        time.sleep(0.01)
    assert calls == [(signal.SIGTERM, 0)] * 2, calls
    """
    program = start(programs, then, before=before)
    program.terminate()
    wait_until(lambda: programs.said("call 1"), "the former handler")
    assert counted() == COUNT
    program.terminate()
    assert program.wait(LIMIT_S) == 0, programs.log()


@pytest.mark.parametrize("order", ["the handler of the loop is first", "the handler of the loop is second"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sigterm_calls_the_callback_of_an_event_loop_once(
    programs: Programs, counted: Callable[[], int], order: str, loop: str
) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    then = f"""
    record(18)
    calls = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: calls.append(1))
        if {order.endswith("first")}:
            perf.close()
            globals().update(perf=AgentPerf(flush_on_sigterm=True))
            globals().update(collector=perf.metrics)
        record()
        print("ready", flush=True)
        while not calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert calls == [1], calls

    import {loop}
    {loop}.run(main())
    """
    program = start(programs, then)
    program.terminate()
    assert program.wait(LIMIT_S) == 0, programs.log()
    assert counted() == COUNT


def test_sigterm_is_handled_again_after_an_event_loop(programs: Programs, counted: Callable[[], int]) -> None:
    """When an event loop ends, it resets SIGTERM to the default action."""
    then = """
    async def main():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, print)

    asyncio.run(main())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    """
    program = start(programs, then + UNTIL_KILLED)
    program.terminate()
    assert program.wait(LIMIT_S) == -signal.SIGTERM
    assert counted() == COUNT


def test_sigterm_while_the_lock_of_the_buffer_is_held_loses_nothing(
    programs: Programs, counted: Callable[[], int]
) -> None:
    """The interrupted code continues and releases the lock. Only then can the flush begin."""
    then = """
    record(19)
    with collector._flusher.buffer._lock:
        print("ready", flush=True)
        until = time.monotonic() + 0.5
        while time.monotonic() < until or not os.path.exists("sent"):
            time.sleep(0.01)
    time.sleep(100)
    """
    program = start(programs, then)
    program.terminate()
    programs.write("sent", "")
    assert program.wait(LIMIT_S) == -signal.SIGTERM
    assert counted() == COUNT


def test_sigterm_ends_the_process_soon_without_the_server(proxy: Proxy, programs: Programs) -> None:
    program = start(programs, UNTIL_KILLED, url=proxy.url)
    proxy.go_silent()
    with StallDetector() as stalls:
        begin = time.monotonic()
        program.terminate()
        assert program.wait(LIMIT_S) == -signal.SIGTERM
        assert stalls.own(begin, time.monotonic()) < 2.0 + SLACK_S
    assert "19 executions may not have been counted" in programs.log()


def test_second_sigterm_ends_the_process_at_once(proxy: Proxy, programs: Programs) -> None:
    then = """
    from agentperf_redis.metrics import flusher
    flusher.CLOSE_S = flusher.MAX_LAST_FLUSH_S = 1000.0
    """
    program = start(programs, then + UNTIL_KILLED, url=proxy.url)
    proxy.go_silent()
    program.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.3)
    program.terminate()
    assert program.wait(LIMIT_S) == -signal.SIGTERM


def test_forked_child_ends_by_sigterm_with_its_own_records(programs: Programs, counted: Callable[[], int]) -> None:
    """A child inherits the handler. If the child resets SIGTERM like Celery, its first record restores the handler."""
    then = """
    for resets in (False, True):
        child = os.fork()
        if child == 0:
            if resets:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            record(9)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    record()
    print("ready", flush=True)
    time.sleep(100)
    """
    program = start(programs, then)
    program.terminate()
    assert program.wait(LIMIT_S) == -signal.SIGTERM
    assert counted() == COUNT


def test_no_forked_child_survives_sigterm(programs: Programs) -> None:
    """Python drops a signal that reaches a forked child before its first line of code. SIGTERM must not be dropped."""
    then = """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # so that the parent usually runs before the child
    for _ in range(50):
        child = os.fork()
        if child == 0:
            time.sleep(100)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    print("ready", flush=True)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    time.sleep(100)
    """
    program = start(programs, then)
    program.terminate()
    assert program.wait(LIMIT_S) == -signal.SIGTERM


def test_ignored_sigterm_stays_ignored(programs: Programs) -> None:
    program = start(programs, UNTIL_KILLED, before="    signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    program.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.3)
    os.kill(program.pid, signal.SIGKILL)
