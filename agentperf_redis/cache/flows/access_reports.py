"""Reports to the server those reads that made no script call; see `access_buffer`."""

from __future__ import annotations

import time
from typing import Final

from agentperf_redis.cache import commands
from agentperf_redis.cache.flows.settings import ATTEMPTS, before_read, ready
from agentperf_redis.cache.process.access_buffer import NO_REPORT
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Flow, Wait, WakeUp
from agentperf_redis.errors import BackendFull

_WAIT_SHARE: Final = 0.25
"""How long to wait for a report that another thread or task is sending, as a share of a command's deadline. The wait is
long enough that a server stall of a second does not reverse the order of the report and the next command. It is short
enough to add little to the delay of a call while the server is unreachable."""


def under_way(shared: SharedState, waited: WakeUp | None = None) -> Flow[WakeUp | None]:
    """Wait, for a limited time, for the report that another thread or task is sending.

    If the report is finished within this time, it precedes the caller's next command.

    Args:
        shared: the state of the cache in this process.
        waited: a report that the caller has already waited for. This flow does not wait for it again.

    Returns:
        The most recent report that this flow or the caller has waited for.
    """
    flushing = shared.access_buffer.flushing
    if flushing is None or flushing is waited:
        return waited
    yield from Wait(flushing, _WAIT_SHARE * shared.backend.deadline)
    return flushing


def flush(shared: SharedState, waited: WakeUp | None = None) -> Flow[None]:
    """Report all buffered reads. `under_way` explains `waited`."""
    access_buffer, attempts = shared.access_buffer, 0
    yield from before_read(shared)
    waited = yield from under_way(shared, waited)
    while attempts < ATTEMPTS:
        report, confirmed = access_buffer.take(flush=True), False
        if report is NO_REPORT:
            if access_buffer.flushing in (None, waited):
                return
            waited = yield from under_way(shared, waited)  # another flush has just begun
            attempts += 1
            continue
        try:
            yield from ready(shared)
            sent_at = time.monotonic()
            now_ms = yield from commands.report_reads(shared.keys, access_buffer.writer, report)
            if now_ms is not None:
                confirmed = True
                shared.set_clock(now_ms, sent_at)
        finally:
            access_buffer.settle(report, confirmed=confirmed)
        if not confirmed:
            shared.deployed = False
            attempts += 1


def flush_if_possible(shared: SharedState) -> Flow[None]:
    """Report all buffered reads before a read. If the server is full, they stay buffered, and no error is raised."""
    try:
        yield from flush(shared)
    except BackendFull as error:
        shared.warn("cache %s: reads cannot be reported: %s", shared.name, error)
