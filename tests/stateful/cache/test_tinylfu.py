"""Policy tinylfu against its model: compares the whole state in Redis after random operations, and detects mutants."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache, maintenance
from tests.support.cache_scan import faults
from tests.support.mutants import alter
from tests.support.servers import Raw
from tests.support.tinylfu import COLD, FROM_WINDOW, HOT, PERIOD, RESTS, TIERS, TinyLFU, differences

SMALL = [(2, 2, 1), (1, 2, 3), (0, 0, 6)]
LARGE = [(8, 40, 160), (0, 0, 120)]


class Both:
    """A cache on the server and its model, with the same operations applied to both."""

    def __init__(self, backend: Backend, raw: Raw, capacities: tuple[int, int, int]) -> None:
        self.raw = raw
        self.cache: LRUCache | TieredCache
        if capacities[HOT]:
            self.cache = TieredCache(*capacities, name="default", backend=backend)
        else:
            self.cache = LRUCache(capacities[-1], policy="tinylfu", name="default", backend=backend)
        self.model = TinyLFU(*capacities)
        self.where = self.cache._shared_state.keys
        self.reads: dict[str, int] = {}
        self.missed = False

    def get(self, key: str) -> None:
        expected = key if key in self.model else None
        assert self.cache.get(key) == expected, key
        if expected is None:
            self.missed = True
        else:
            self.reads[key] = self.reads.pop(key, 0) + 1

    def put(self, key: str, tier: int | None = None) -> None:
        if isinstance(self.cache, TieredCache) and tier is not None:
            self.cache.put(key, key, TIERS[tier])
        else:
            tier = None
            self.cache.put(key, key)
        self.model.put(key, self.reads, tier)
        self.reads, self.missed = {}, False
        assert self.cache.get(key) == key, "the next get finds the value"
        self.reads[key] = 1

    def flush(self) -> None:
        self.cache.flush()
        if self.reads or self.missed:
            self.model.touch(self.reads)
            self.model.balance()
        self.reads, self.missed = {}, False

    def delete(self, key: str) -> None:
        assert self.cache.delete(key) is (key in self.model)
        self.model.delete(key)

    def differences(self) -> list[str]:
        return differences(self.raw, self.where, self.model)


def work(both: Both, seed: int, operations: int, look_every: int) -> list[str]:
    """Do `operations` random operations; return the first differences found."""
    chance = random.Random(seed)
    keys = 3 * both.model.total
    drifted = 0
    for step in range(operations):
        drifted += step % 7 == 0 and step % 600 > 300  # the popular keys drift in the second half of every 600 steps
        key = f"k{(drifted + int(keys * chance.random() ** 3)) % (8 * keys)}"
        match chance.randrange(24):
            case 0:
                both.delete(key)
            case 1:
                both.flush()
            case 2:
                both.put(key, chance.randrange(3))
            case choice if choice < 9:
                both.put(key)
            case _:
                both.get(key)
                if key not in both.model:
                    both.put(key)
        if step % look_every == 0 and (found := both.differences()):
            return [f"after operation {step}", *found]
    return both.differences()


@pytest.fixture(autouse=True)
def _reports_go_when_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "REPORT_AFTER_S", 3600)


@pytest.mark.parametrize(
    ("capacities", "operations", "look_every"),
    [(SMALL[0], 600, 1), pytest.param(SMALL[1], 600, 1, marks=pytest.mark.thorough), (SMALL[2], 600, 1)]
    + [pytest.param(capacities, 2500, 50, marks=pytest.mark.thorough) for capacities in LARGE],
)
def test_server_state_matches_the_model_after_any_operations(
    backend: Backend, raw: Raw, namespace: str, capacities: tuple[int, int, int], operations: int, look_every: int
) -> None:
    both = Both(backend, raw, capacities)

    assert work(both, 1, operations, look_every) == []

    assert both.model.halvings[-1] or capacities in LARGE, "frequencies were halved several times"
    assert both.model.ghosts
    service = "tiered" if capacities[HOT] else "cache"
    assert faults(raw, namespace, service, "default") == []


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("line", "instead"),
    [
        (
            "if I.frequency(young_score) > I.frequency(score) then",
            "if I.frequency(young_score) >= I.frequency(score) then",
        ),
        ("I.adapt(-1)", "I.tail = 0"),
        ("I.adapt(1)", "I.tail = 0"),
        ("f = math.floor(f / 2)", "f = math.max(0, f - 1)"),
        ("f = I.aged(at, remembered % 8) + 1", "f = 1"),
        ("(i == 4 and 8 or 0)", "0"),
        ("-1 - math.max(16, I.share(2))", "-1 - math.max(16, I.share(1))"),
    ],
)
def test_changed_policy_fails_the_check(
    backend: Backend, raw: Raw, monkeypatch: pytest.MonkeyPatch, line: str, instead: str
) -> None:
    alter(monkeypatch, "cache/put", line, instead)

    assert work(Both(backend, raw, (8, 40, 160)), 1, 2500, 50) != []


WINDOW = 50
"""Number of entries by which the window has already grown when a test of periods begins. The cache has 100 entries."""


def scan_after_good_period(backend: Backend, raw: Raw) -> Both:
    """Fill a cache with evictions, and set the state as if the window had moved after a period with 90 % of hits.

    Then put new keys for a period. `put` also reads each key once, so half of the accesses are hits.
    """
    both = Both(backend, raw, (0, 0, 100))
    for number in range(250):
        both.put(f"fill{number}")
    both.flush()
    both.model.grow, both.model.trend, both.model.last_ratio, both.model.last_grow = WINDOW, 0.5, 0.9, 2.0
    raw.hset(both.where.meta, mapping={"grow": WINDOW, "climb": f"0.5 0 0.9 2 {both.model.age}"})
    before = both.model.accesses
    number = 0
    while both.model.accesses >= before:
        before = both.model.accesses
        both.put(f"scan{number}")
        number += 1
    return both


@pytest.mark.servers("valkey")
def test_window_returns_if_its_move_cost_hits(backend: Backend, raw: Raw) -> None:
    both = scan_after_good_period(backend, raw)

    assert both.differences() == []
    assert both.model.grow == 2
    assert both.model.rests == RESTS


def scan_for_two_periods(backend: Backend, raw: Raw) -> Both:
    """Continue the scan after the window has returned, so that the hit ratio stays low."""
    both = scan_after_good_period(backend, raw)
    for number in range(PERIOD * both.model.total):  # each `put` of `both` makes two accesses
        both.put(f"later{number}")
    return both


@pytest.mark.servers("valkey")
def test_window_may_move_if_its_return_did_not_help(backend: Backend, raw: Raw) -> None:
    both = scan_for_two_periods(backend, raw)

    assert both.differences() == []
    assert both.model.rests == 0


@pytest.mark.servers("valkey")
def test_window_rests_if_its_return_helped(backend: Backend, raw: Raw) -> None:
    both = scan_after_good_period(backend, raw)
    both.put("kept")
    while both.model.rests > RESTS - 3:
        for _ in range(50):
            both.get("kept")
        both.flush()
        assert both.model.rests, "the window rests for more than two periods"

    assert both.differences() == []


@pytest.mark.servers("valkey")
@pytest.mark.parametrize(
    ("scan", "line", "instead"),
    [
        (scan_after_good_period, "I.grow = math.min(max, c.grow)", "I.grow = max"),
        (scan_after_good_period, "c.trend, c.rest = 0, 8", "c.rest = 4"),
        (scan_after_good_period, "c.trend, c.rest = 0, 8", "c.trend = 0"),
        (scan_for_two_periods, "if c.rest == 7 then return end", ""),
        (scan_for_two_periods, "if c.rest == 6 and has_fallen then c.rest = 0 end", ""),
    ],
)
@pytest.mark.thorough
def test_changed_return_of_the_window_fails_the_check(
    backend: Backend, raw: Raw, monkeypatch: pytest.MonkeyPatch, scan: Callable[..., Both], line: str, instead: str
) -> None:
    alter(monkeypatch, "cache/put", line, instead)
    assert scan(backend, raw).differences() != []


@pytest.mark.servers("valkey")
def test_balanced_signals_leave_the_window(backend: Backend, raw: Raw) -> None:
    """Alternating signals move the window by less than one entry. Signals of one direction move it by more than 10."""
    both = Both(backend, raw, (0, 0, 100))
    for number in range(160):
        both.put(f"k{number}")
    both.flush()
    moved = []
    for agree in (False, True):
        both.model.grow, both.model.trend = 20.0, 0.0
        raw.hset(both.where.meta, mapping={"grow": 20, "climb": "0 0 -1 20 0"})
        both.model.last_ratio, both.model.last_grow, both.model.age = -1.0, 20.0, 0
        for step in range(40):
            signal(both, 1 if agree or step % 2 else -1)
        assert both.differences() == []
        moved.append(abs(both.model.grow - 20))
    assert moved[0] < 1
    assert moved[1] > 10


def signal(both: Both, direction: int) -> None:
    """Read the oldest entry of cold, or put the last evicted key again as a key that was evicted from the window."""
    if direction < 0:
        both.get(both.model.tiers[COLD].order()[0])
        both.flush()
        return
    key = both.model.ghosts.order()[-1]
    if both.model.ghosts[key] % 16 < FROM_WINDOW:
        both.model.ghosts[key] += FROM_WINDOW
        both.raw.zincrby(both.where.ghost, FROM_WINDOW, key)
    both.put(key)
    both.flush()
