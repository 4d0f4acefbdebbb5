"""For some mutants, calls in an order that reveals the fault. In a torture run, this order occurs only by chance.

Each scene writes a journal as the workers of a torture run do, and yields the complaints of a check of the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Self

from agentperf_redis import AgentPerf, LRUCache
from agentperf_redis.metrics.commands import FLUSH
from tests.support.caches import copied
from tests.support.proxy import Proxy
from tests.support.servers import wait_until
from tests.torture import checks, journal
from tests.torture.journal import Journal
from tests.torture.work import CACHE, FILL_KEYS, PUT_KEYS

KEY, OTHER_KEY = PUT_KEYS[:2]
COMPUTED = FILL_KEYS[0]


class Scene:
    """Two workers of one server. The requests of worker 0 pass through a proxy.

    Args:
        proxy: the proxy.
        url: the server.
        namespace: the namespace.
        folder: an empty folder for the journals.
    """

    def __init__(self, proxy: Proxy, url: str, namespace: str, folder: Path) -> None:
        self.proxy = proxy
        self.folder = folder
        self._stack = ExitStack()
        self.journals = [Journal(folder, number) for number in range(2)]
        self.workers = [
            self._stack.enter_context(AgentPerf(each, namespace=namespace, deadline=5.0)) for each in (proxy.url, url)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cache(self, worker: int) -> LRUCache:
        """Return the cache as a worker uses it. Worker 0 keeps local copies."""
        return self.workers[worker].cache(CACHE, max_size=30, local_size=None if worker else 30)

    def put(self, worker: int, key: str, value: str) -> None:
        """Store a value."""
        self.journals[worker].write("write", "put", value, [key])
        self.cache(worker).put(key, value)
        self.journals[worker].write("wrote", value)

    def clear(self, worker: int, value: str) -> None:
        """Delete all values. `value` names this write in the journal."""
        self.journals[worker].write("write", "clear", value, [*PUT_KEYS, *FILL_KEYS])
        self.cache(worker).clear()
        self.journals[worker].write("wrote", value)

    def read(self, worker: int, key: str, *, fresh: bool = False) -> None:
        """Read a key."""
        begun = time.monotonic()
        found = self.cache(worker).get(key, fresh=fresh)
        if found is not None:
            self.journals[worker].write("read", key, found, begun, fresh)

    def lines(self) -> list[journal.Line]:
        """Return what the workers have written so far."""
        return list(journal.lines(self.folder))


def _fill_after_an_invalidation(scene: Scene) -> Iterator[str]:
    """The cache is cleared while a value is computed. The value must not be stored."""

    def compute() -> str:
        scene.journals[0].write("computes", COMPUTED, "computed", begun)
        scene.clear(1, "cleared")
        return "computed"

    begun = time.monotonic()
    scene.cache(0).get_or_compute(COMPUTED, compute)
    scene.read(1, COMPUTED, fresh=True)
    return checks.stale_reads(scene.lines())


def _copy_after_an_invalidation(scene: Scene) -> Iterator[str]:
    """A key is overwritten while it is read. The reply of the read must not become a local copy."""
    scene.put(1, KEY, "old")
    scene.put(1, OTHER_KEY, "other")
    copied(scene.cache(0), OTHER_KEY)
    heard = threading.Event()
    state = scene.cache(0)._shared_state
    assert state.local is not None
    listening = scene.workers[0].backend.bus.subscribe(
        state.keys.bus, lambda message: heard.set() if message.endswith(b" " + KEY.encode()) else None, lambda: None
    )
    asked = scene.proxy.keep_reply(only=lambda request: request[0] == b"MGET" and request[1].endswith(KEY.encode()))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(scene.read, 0, KEY)
        asked.wait()
        wait_until(asked.answered.is_set, "the reply to the read")
        heard.clear()  # the messages so far were about the old value
        scene.put(1, KEY, "new")
        wait_until(heard.is_set, "the message about the new value")
        asked.let_go()
        reading.result()
    listening.close()
    time.sleep(checks.STALE_S)  # for STALE_S after the write, an old value is permitted
    scene.read(0, KEY)
    return checks.stale_reads(scene.lines())


def _flush_without_a_reply(scene: Scene) -> Iterator[str]:
    """The reply of a flush is lost, so it is sent again. It must be counted once."""
    metrics = scene.workers[0].metrics
    for recorded in (1, 2):
        metrics.record_execution("agent-0", 0.1, success=True)
        scene.journals[0].write("records", recorded)
        lost = scene.proxy.reset_after_reply(only=FLUSH)
        metrics.flush()
        lost.wait()
    delivery = metrics.delivery()
    scene.journals[0].write("ended", 2, delivery.counted, delivery.dropped, delivery.pending)
    stored = scene.workers[1].metrics.get_or_create_metrics("agent-0").task_count
    return checks.lost_or_doubled_counts(scene.lines(), {"agent-0": stored}, set())


SCENES = MappingProxyType[str, Callable[[Scene], Iterator[str]]](
    {
        "unguarded fill": _fill_after_an_invalidation,
        "unguarded local copy": _copy_after_an_invalidation,
        "repeated flush": _flush_without_a_reply,
    }
)
"""A scene for each mutant whose fault a torture run meets only by chance."""
