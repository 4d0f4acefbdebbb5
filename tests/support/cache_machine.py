"""The base class of the caches' state machines. A machine has its own namespace and expires entries on demand."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache, maintenance
from agentperf_redis.keys import CacheKeys
from tests.support.servers import Raw, Server, new_namespace


@dataclass(kw_only=True)
class Entry:
    """The fields that every model records for a key."""

    expired: bool = False
    """Whether the entry has expired. An expired entry keeps its place until a put, a report or a sweep."""
    dead: bool = False
    """Whether a tag of the entry was invalidated. Such an entry keeps its place until overwritten, evicted or swept."""


class CacheMachine(RuleBasedStateMachine):
    """A cache and its model, which has one record per key. Each machine adds its rules and `they_agree`."""

    server: ClassVar[Server]
    cache: LRUCache | TieredCache
    model: MutableMapping[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.backend = Backend(self.server.url, namespace=new_namespace(type(self).__name__))
        self.raw: Raw = self.server.client()
        self.unreported = False
        """Whether reads are waiting to be reported."""

    @property
    def where(self) -> CacheKeys:
        """The names of the cache's keys."""
        return self.cache._shared_state.keys

    def teardown(self) -> None:
        self.they_agree()
        self.backend.close()
        self.raw.close()

    def they_agree(self) -> None:
        raise NotImplementedError

    def reported(self) -> None:
        """Change the model in the same way as a report of the buffered reads changes the cache."""
        raise NotImplementedError

    def removed(self, key: str) -> None:
        """Remove an entry from the model for a reason other than eviction."""
        del self.model[key]

    def remove_expired(self) -> None:
        for key in [key for key, held in self.model.items() if held.expired]:
            self.removed(key)

    def alive(self, key: str) -> Any:
        held = self.model.get(key)
        return None if held is None or held.expired or held.dead else held

    def deleted(self, key: str) -> None:
        held: Entry | None = self.model.pop(key, None)
        assert self.cache.delete(key) is (held is not None and not held.expired)

    def swept(self) -> None:
        self.cache.sweep()
        self.remove_expired()
        for key in [key for key, held in self.model.items() if held.dead]:
            self.removed(key)

    def cleared(self) -> None:
        self.cache.clear()
        self.model.clear()

    def time_is_over(self, key: str, *, expires: bool) -> None:
        """Expire one entry on the server at once, instead of waiting for the end of its TTL."""
        held: Entry | None = self.model.get(key)
        if held is None or not expires or held.expired:
            return
        self.cache.flush()  # report the reads now: a report after the expiry would not move the entry
        self.reported()
        if key not in self.model:
            return
        held.expired = True
        self.raw.delete(self.where.entry(key))
        self.raw.hset(self.where.meta, "next", 1)


def run(machine: type[CacheMachine], server: Server, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """Run a machine on a server for `examples` sequences, or until the first difference."""
    # Only the rules trigger reports of reads. Elapsed time must not trigger a report.
    monkeypatch.setattr(maintenance, "REPORT_AFTER_S", 3600)
    effort = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # without shrinking, which takes minutes over a network
    )
    monkeypatch.setattr(machine, "server", server, raising=False)
    run_state_machine_as_test(machine, settings=effort)
