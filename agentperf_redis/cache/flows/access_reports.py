"""Telling the server of reads that were served without it; see `outbox`."""

from __future__ import annotations

import time
from typing import Final

from agentperf_redis.cache import commands
from agentperf_redis.cache.flows.settings import ATTEMPTS, ready
from agentperf_redis.cache.process.access_buffer import NO_REPORT
from agentperf_redis.cache.process.shared_state import Binding
from agentperf_redis.command import Flow, Hint, Wait
from agentperf_redis.errors import BackendFull

_PATIENCE: Final = 0.25
"""How long to wait for reads that another thread or task reports at this moment, as a part of a command's deadline. A
server that is held up for a second must not turn the order round; one that is away must not cost a call much more."""


def under_way(binding: Binding, waited: Hint | None = None) -> Flow[Hint | None]:
    """Wait for reads that another thread or task reports at this moment: they come before what is sent next.

    Args:
        binding: of the cache.
        waited: what was waited for before: it is not waited for again.

    Returns:
        What was waited for last.
    """
    flushing = binding.outbox.flushing
    if flushing is None or flushing is waited:
        return waited
    yield from Wait(flushing, _PATIENCE * binding.backend.deadline)
    return flushing


def flush(binding: Binding, waited: Hint | None = None) -> Flow[None]:
    """Report all reads that wait; `waited` as for `under_way`."""
    outbox, attempts = binding.outbox, 0
    if binding.owed:
        yield from ready(binding)
    yield from under_way(binding, waited)
    while attempts < ATTEMPTS:
        report, taken_in = outbox.take(flush=True), False
        if report is NO_REPORT:
            return
        try:
            yield from ready(binding)
            asked_at = time.monotonic()
            now_ms = yield from commands.report_reads(binding.keys, outbox.writer, report)
            if now_ms is not None:
                taken_in = True
                binding.set_clock(now_ms, asked_at)
        finally:
            outbox.settle(report, taken_in=taken_in)
        if not taken_in:
            binding.deployed = False
            attempts += 1


def flush_if_room(binding: Binding) -> Flow[None]:
    """Report all reads that wait, on the way of a read, which a full server must not fail: then they wait on."""
    try:
        yield from flush(binding)
    except BackendFull as error:
        binding.complain("cache %s: reads cannot be reported: %s", binding.name, error)
