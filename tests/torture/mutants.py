"""Faults that are put into the library on purpose. The checks of the torture test must catch each of them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.alerts import notify
from agentperf_redis.cache.process.local_copies import LocalCopies
from agentperf_redis.metrics import commands as metrics_commands
from agentperf_redis.script import Script
from tests.support import pool_history
from tests.support.mutants import SEQUENCE_CHECK, Change, changed

POOL_MUTANTS: dict[str, tuple[Change, ...]] = {
    "no capacity check": (
        ("  if load < limit then\n    if score", "  if true then\n    if score"),
        ("    if load >= limit then\n", "    if false then\n"),
        ("  if r and r.load < r.limit then\n    local fence", "  if r then\n    local fence"),
        ("  if r and r.load < r.limit then return r, id end\n", "  if r then return r, id end\n"),
    ),
    "no tombstone": (
        ("  function self.tombstone(token, why, keep_ms)\n", "  function self.tombstone() if true then return end\n"),
    ),
    "token made by the server": (
        (
            "local TOKEN, TTL_MS, LATE, WANTED = ARGV[1],",
            "local TOKEN, TTL_MS, LATE, WANTED = ARGV[1] .. redis.call('TIME')[2],",
        ),
    ),
}
"""Changes of the balancer's scripts."""

_OTHERS: dict[str, tuple[Script, Change]] = {
    "unguarded fill": (Script("cache/put"), ("    if stale then\n", "    if false then\n")),
    "repeated flush": (metrics_commands.FLUSH, (SEQUENCE_CHECK, "")),
}


def without_tickets(patch: pytest.MonkeyPatch) -> None:
    """Let local copies be filled with values that were read before an invalidation."""

    class Anything:
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = None  # type: ignore[assignment]

    patch.setattr(LocalCopies, "ticket", lambda *_: Anything())


def _with_mixed_shards(patch: pytest.MonkeyPatch) -> None:
    """Make processes count the same agent in different shards."""
    plain: Callable[[str], int] = keys.metrics_shard
    patch.setattr(keys, "metrics_shard", lambda agent: (plain(agent) + os.getpid()) % keys.METRICS_SHARDS)


def _with_new_ids(patch: pytest.MonkeyPatch) -> None:
    """Give each delivery of a notification a new id."""
    plain: Callable[..., str] = notify.send

    def send(address: Any, payload: str) -> str:
        return plain(address, json.dumps({**json.loads(payload), "id": secrets.token_hex(8)}))

    patch.setattr(notify, "send", send)


_PATCHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "unguarded local copy": without_tickets,
    "mixed-up shards": _with_mixed_shards,
    "alert under another id": _with_new_ids,
}

MUTANTS = (*POOL_MUTANTS, *_OTHERS, *_PATCHES)


@contextmanager
def applied(mutant: str) -> Iterator[None]:
    """Make the balancer's scripts of this process log their history, and apply a mutant, until the block ends.

    Args:
        mutant: one of `MUTANTS`; empty for none.
    """
    scripts, groups = list(pool_history.SCRIPTS), [pool_history.LOGGING, POOL_MUTANTS.get(mutant, ())]
    if mutant in _OTHERS:
        script, change = _OTHERS[mutant]
        scripts.append(script)
        groups.append((change,))
    with changed(scripts, *groups), pytest.MonkeyPatch.context() as patch:
        if mutant in _PATCHES:
            _PATCHES[mutant](patch)
        yield
