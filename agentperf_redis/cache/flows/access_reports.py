"""Reports to the server those reads that made no script call; see `access_buffer`."""

from __future__ import annotations

import time
from typing import Final

from agentperf_redis.cache import commands
from agentperf_redis.cache.flows.settings import ATTEMPTS, prepare, ready
from agentperf_redis.cache.process.access_buffer import NO_REPORT
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Flow, Wait, WakeUp
from agentperf_redis.errors import BackendFull

_WAIT_SHARE: Final = 0.25
"""Maximum time to wait for a report that another thread or task is sending, as a share of a command's deadline. It is
long enough that the report precedes the next command even if the server stalls for a second. It is short enough to add
little to the delay of a call while the server is unreachable."""


def under_way(shard: Shard, waited: WakeUp | None = None) -> Flow[WakeUp | None]:
    """Wait, for a limited time, for the report that another thread or task is sending.

    If the report is finished within this time, it precedes the caller's next command.

    Args:
        shard: the shard that the report concerns.
        waited: a report that the caller has already waited for. This flow does not wait for it again.

    Returns:
        The most recent report that this flow or the caller has waited for.
    """
    flushing = shard.access_buffer.flushing
    if flushing is None or flushing is waited:
        return waited
    yield from Wait(flushing, _WAIT_SHARE * shard.cache.backend.deadline)
    return flushing


def flush(shard: Shard, waited: WakeUp | None = None) -> Flow[None]:
    """Report all buffered reads of a shard. `under_way` explains `waited`."""
    access_buffer, attempts = shard.access_buffer, 0
    if shard.unsent:
        yield from prepare(shard)
    waited = yield from under_way(shard, waited)
    while attempts < ATTEMPTS and not shard.retired:
        report, confirmed = access_buffer.take(flush=True), False
        if report is NO_REPORT:
            if access_buffer.flushing in (None, waited):
                return
            waited = yield from under_way(shard, waited)  # another flush has just begun
            attempts += 1
            continue
        try:
            yield from ready(shard)
            if shard.retired:
                return
            sent_at = time.monotonic()
            now_ms = yield from commands.report_reads(shard.keys, access_buffer.writer, report)
            if now_ms is not None:
                confirmed = True
                shard.set_clock(now_ms, sent_at)
        finally:
            access_buffer.settle(report, confirmed=confirmed)
        if not confirmed:
            shard.lose_settings()
            attempts += 1


def flush_all(shared: SharedState) -> Flow[None]:
    """Report all buffered reads of a cache."""
    for shard in shared.shards:
        yield from flush(shard)


def flush_if_possible(flushing: Flow[None], shared: SharedState) -> Flow[None]:
    """Report buffered reads before a read. If the server is full, they stay buffered, and no error is raised.

    Args:
        flushing: `flush` of a shard, or `flush_all`.
        shared: the state of the cache in this process.
    """
    try:
        yield from flushing
    except BackendFull as error:
        shared.warn("cache %s: reads cannot be reported: %s", shared.name, error)
