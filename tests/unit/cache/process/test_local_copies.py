"""Local copies are bounded, guarded by tickets, and not used while the bus may be broken."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis.cache.entry_format import Stored
from agentperf_redis.cache.process import local_copies
from agentperf_redis.cache.process.local_copies import Copy, LocalCopies


def stored(version: int = 1, data: bytes = b"m\x01", tags: tuple[str, ...] = (), cost_ms: int = 0) -> Stored:
    return Stored(version, 0, cost_ms, 0, tags, data)


class Bus:
    """A bus that was proven to work at a given time."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.announced = 0
        self.arrives: Callable[[], object] = lambda: None
        """Simulates the messages that arrive before the reply to a ping."""

    def proven_at(self) -> float:
        self.arrives()
        return time.monotonic() if self.at is None else self.at

    def announce(self, _name: str) -> None:
        self.announced += 1


@pytest.fixture
def bus() -> Bus:
    return Bus()


def copies(bus: Bus, max_entries: int = 3, max_bytes: int | None = None) -> LocalCopies:
    return LocalCopies(max_entries, max_bytes, bus.proven_at, bus.announce)


def fill(local: LocalCopies, key: str, value: object = 1, name: str | None = None, **facts: object) -> None:
    name = name or key
    local.fill(key, name, stored(**facts), value, 10, local.ticket(name))  # type: ignore[arg-type]


def held(local: LocalCopies, *keys: str) -> list[str]:
    return [key for key in keys if local.find(key) is not None]


def test_copy_is_found_and_its_reads_counted(bus: Bus) -> None:
    local = copies(bus)
    fill(local, "k", "value", cost_ms=5)
    first, second = local.find("k"), local.find("k")
    assert first is second
    assert first is not None
    assert (first.frozen, first.value) == (True, "value")
    assert bus.announced == 1
    assert local.drain() == [("k", 2, 10)]
    assert local.drain() == []


def test_only_a_used_copy_counts_as_read(bus: Bus) -> None:
    local = copies(bus)
    fill(local, "k", cost_ms=5)
    copy = local.find("k", counted=False)
    assert copy is not None
    assert local.drain() == []
    local.count(copy)
    assert local.drain() == [("k", 1, 5)]
    assert local.drain() == []
    assert bus.announced == 1


def test_read_counted_during_a_report_is_reported_next(bus: Bus) -> None:
    local = copies(bus)
    fill(local, "k")
    copy = local.find("k")
    assert copy is not None
    local._read = Interrupted([copy], lambda: local.count(copy))
    found = local.drain() + local.drain()
    assert sum(count for _, count, _ in found) == 2
    local.find("k")
    assert local.drain() == [("k", 1, 0)]


class Interrupted(list[Copy]):
    """A list whose iteration runs another thread's code after each element."""

    def __init__(self, copies: list[Copy], other: Callable[[], object]) -> None:
        super().__init__(copies)
        self._other = other

    def __iter__(self) -> Iterator[Copy]:
        for copy in list.__iter__(self):
            yield copy
            self._other()


def test_only_immutable_values_are_shared(bus: Bus) -> None:
    local = copies(bus, 10)
    values: list[object] = [None, True, 1, 1.5, "s", b"b", [1], {}, (1, [2]), {1}, bytearray()]
    for number, value in enumerate(values):
        fill(local, str(number), value)
    frozen = [copy.frozen for number in range(10) if (copy := local.find(str(number + 1))) is not None]
    assert frozen == [True] * 5 + [False] * 5


def test_full_copies_evict_unread_entries_first(bus: Bus) -> None:
    local = copies(bus)
    for key in "abc":
        fill(local, key)
    local.find("a")
    fill(local, "d")
    assert held(local, *"abcd") == ["a", "c", "d"]
    assert len(local) == 3


def test_bytes_of_copies_are_bounded(bus: Bus) -> None:
    local = copies(bus, 1000, 100)
    for number in range(50):
        fill(local, f"k{number}", data=b"x" * 20)
        assert sum(copy.size_bytes for copy in local._copies.values()) == local._bytes <= 100
    fill(local, "large", data=b"x" * 200)
    assert local.find("large") is None


@pytest.mark.parametrize("seed", range(5))
def test_list_and_table_of_copies_agree(bus: Bus, seed: int) -> None:
    chance, local = random.Random(seed), copies(bus, 8, 300)
    for _ in range(2000):
        key = f"k{chance.randrange(20)}"
        match chance.randrange(8):
            case 0:
                local.drop(key)
            case 1:
                local.drop_tag("t")
            case 2 | 3 | 4:
                tags = ("t",) if chance.random() < 0.2 else ()
                fill(local, key, data=b"x" * chance.randrange(60), tags=tags)
            case _:
                local.find(key)
        ring, copy = [], local._newest
        while copy is not None:
            ring.append(copy.key)
            assert copy.older is None or copy.older.newer is copy
            copy = copy.older
        assert sorted(ring) == sorted(local._copies)
        assert (ring[-1] if ring else None) == (local._oldest.key if local._oldest else None)
        assert local._bytes == sum(each.size_bytes for each in local._copies.values())
        assert len(ring) <= 8


def test_copies_are_unused_while_bus_is_in_doubt(bus: Bus) -> None:
    local = copies(bus)
    fill(local, "k")
    bus.at = time.monotonic() - 0.3
    assert local.find("k") is None
    bus.at = time.monotonic()
    assert local.find("k") is not None


@pytest.mark.parametrize("forget", ["drop", "drop_tag", "flush", "set_aside"])
def test_copy_dropped_before_the_proof_is_unused(bus: Bus, forget: str) -> None:
    """During a read, the bus's thread delivers a message or a gap, and then the reply to the ping."""
    local = copies(bus)
    fill(local, "k", tags=("t",))
    bus.arrives = lambda: getattr(local, forget)(*{"drop": ("k",), "drop_tag": ("t",)}.get(forget, ()))
    assert local.find("k") is None
    assert len(local) == 0, "the message arrived during the read"


@pytest.mark.parametrize("reported", [False, True], ids=["before the gap is reported", "after"])
def test_proof_of_a_lost_bus_stays_valid(bus: Bus, monkeypatch: pytest.MonkeyPatch, reported: bool) -> None:
    """A read during a loss of the bus must not discard the earlier proof that the bus worked."""
    now = [1000.0]
    monkeypatch.setattr(local_copies, "monotonic", lambda: now[0])
    local = copies(bus)
    bus.at = now[0]
    fill(local, "k")
    assert held(local, "k") == ["k"]
    now[0] += 1.0
    bus.at = 0.0  # the bus is lost
    assert held(local, "k") == []
    if reported:
        local.set_aside()
    assert local.serve_stale("k", 2.0) is not None
    assert local.serve_stale("k", 0.5) is None, "the last proof is older"


def test_copy_is_unused_after_its_ttl(bus: Bus) -> None:
    local = copies(bus)
    local.fill("k", "k", stored(), 1, 0.01, local.ticket("k"))
    local.fill("never", "never", stored(), 1, 0, local.ticket("never"))
    end = time.monotonic() + 0.011
    while time.monotonic() < end:
        pass
    assert held(local, "k", "never") == []
    assert len(local) == 0


@pytest.mark.parametrize("forget", ["drop", "drop_tag", "flush"])
def test_fill_begun_before_invalidation_is_refused(bus: Bus, forget: str) -> None:
    local = copies(bus)
    ticket = local.ticket("k")
    getattr(local, forget)(*{"drop": ("k",), "drop_tag": ("t",), "flush": ()}[forget])
    local.fill("k", "k", stored(), 1, 10, ticket)
    assert local.find("k") is None


def test_message_about_older_version_keeps_newer_copy(bus: Bus) -> None:
    local = copies(bus)
    fill(local, "k", version=5, tags=("t",))
    local.drop("k", older_than=5)
    local.drop_tag("t", older_than=5)
    assert local.find("k") is not None
    local.drop_tag("t", older_than=6)
    assert local.find("k") is None


def test_stored_name_drops_but_does_not_find_copies(bus: Bus) -> None:
    local = copies(bus)
    fill(local, "a long key", name="its hash")
    assert held(local, "a long key", "its hash") == ["a long key"]
    local.drop("its hash")
    assert held(local, "a long key") == []
    assert local._long_names == {}


def test_invalid_keys_are_left_to_the_server(bus: Bus) -> None:
    local = copies(bus)
    assert local.find([1]) is None  # type: ignore[arg-type]


def test_threads_use_copies_concurrently_without_errors(bus: Bus) -> None:
    local, wrong = copies(bus, 20), []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(5000):
                key = f"k{chance.randrange(40)}"
                copy = local.find(key)
                if copy is None:
                    fill(local, key, key)
                elif copy.value != key:
                    wrong.append(key)
                if chance.random() < 0.05:
                    local.drop(key)
        except Exception as error:  # noqa: BLE001  the test reports any error
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(local) <= 20


def test_object_that_cannot_be_hashed_has_no_copy(bus: Bus) -> None:
    class Unhashable:
        def __hash__(self) -> int:
            raise RuntimeError("no")

    key: Any = Unhashable()
    local = copies(bus)
    fill(local, "k")
    assert local.find(key) is None
