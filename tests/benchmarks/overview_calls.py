"""A program that records executions in real time and reads overviews, with one checkout of the library.

The benchmark `overview` runs this program for each checkout. The program imports only public names of the library, so
it works in any checkout. `python overview_calls.py URL NAMESPACE AGENTS EVERY_S` records an execution of each agent
every EVERY_S seconds until it reads the line "recording end". It reads lines "<window>@<timestamp> <kind>", where kind
is "counters" or "percentiles", and answers each with "done" and the processor time of the reading thread, in s.
"""

from __future__ import annotations

import sys
import threading
import time

from agentperf_redis import AgentPerf

DURATIONS_S = [0.05 * 1.1 ** (number % 60) for number in range(1000)]
"""Durations from 50 ms to 14 s, which fall into 60 buckets."""


def main(url: str, namespace: str, agents: int, every_s: int) -> None:
    """Record in a thread, and run the work from stdin, line by line."""
    metrics = AgentPerf(url, namespace=namespace).metrics
    over = threading.Event()

    def record() -> None:
        due, number = time.monotonic(), 0
        while not over.wait(max(0.0, due - time.monotonic())):
            for agent in range(agents):
                number += 1
                metrics.record_execution(f"agent-{agent}", DURATIONS_S[number % 1000], success=True)
            due += every_s

    recorder = threading.Thread(target=record)
    recorder.start()
    for line in sys.stdin:
        what, kind = line.split()
        begun = time.thread_time()
        if what == "recording":
            over.set()
            recorder.join()
            metrics.flush()
        else:
            window, _, as_of = what.partition("@")
            found = metrics.snapshots(window=window, as_of=float(as_of), percentiles=kind == "percentiles")
            assert len(found) == agents
        print("done", time.thread_time() - begun, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
