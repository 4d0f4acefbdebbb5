"""A program that records and flushes executions with one checkout of the library.

The benchmark `recording` runs this program for each checkout. The program imports only public names of the library, so
it works in any checkout. `python recording_calls.py URL NAMESPACE AGENTS CALLS` reads lines "executions <work>". It
answers each with "done" and the processor time of one call, in s.
"""

from __future__ import annotations

import sys
import time

from agentperf_redis import AgentPerf

DURATIONS_S = [0.05 * 1.1 ** (number % 60) for number in range(1000)]
"""Durations from 50 ms to 14 s, which fall into 60 buckets."""


def main(url: str, namespace: str, agents: int, calls: int) -> None:
    """Run the work from stdin, line by line."""
    metrics = AgentPerf(url, namespace=namespace).metrics
    names = [f"agent-{number % agents}" for number in range(calls)]
    begun = recorded = 0.0
    for line in sys.stdin:
        if line.split()[1] == "record":
            begun, start = time.process_time(), time.thread_time()
            for number, name in enumerate(names):
                metrics.record_execution(name, DURATIONS_S[number % 1000], success=True)
            recorded = time.thread_time() - start
            took = recorded / calls
        else:
            metrics.flush()
            # The background thread may already have flushed some records. `took` includes the processor time of these
            # flushes.
            took = time.process_time() - begun - recorded
        print("done", took, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
