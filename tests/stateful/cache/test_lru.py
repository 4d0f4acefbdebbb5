"""LRUCache against a simple model: any sequence of operations by one process, on a real server."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from agentperf_redis.cache import LRUCache
from agentperf_redis.errors import NoInteger
from tests.support.cache_machine import CacheMachine, Entry, run
from tests.support.cache_scan import faults
from tests.support.examples import examples
from tests.support.mutants import alter
from tests.support.servers import Server

MAX_SIZE = 4
KEYS = st.sampled_from("abcdefg")
TAGS = st.sets(st.sampled_from("tu"))
VALUES = st.one_of(st.none(), st.integers(), st.lists(st.integers(), max_size=3))


@dataclass
class Held(Entry):
    """The model's record of a key."""

    value: Any
    tags: frozenset[str]
    expires: bool
    reads: int = 0


class LRUMachine(CacheMachine):
    """The state machine of the cache. Its model is an OrderedDict with the oldest entry first."""

    cache: LRUCache

    def __init__(self) -> None:
        super().__init__()
        self.cache = LRUCache(MAX_SIZE, name="m", backend=self.backend)
        self.model: OrderedDict[str, Held] = OrderedDict()
        self.hits = self.misses = self.evictions = 0

    def reported(self) -> None:
        if self.unreported:
            self.remove_expired()
        self.unreported = False

    def stored(self, key: str, value: Any, tags: set[str], expires: bool) -> None:
        self.unreported = False
        self.remove_expired()
        self.model.pop(key, None)
        self.model[key] = Held(value, frozenset(tags), expires)
        if len(self.model) > MAX_SIZE:
            self.model.popitem(last=False)
            self.evictions += 1

    @rule(keys=st.lists(KEYS, min_size=2, max_size=8))
    def get(self, keys: list[str]) -> None:
        for key in keys:
            held, self.unreported = self.alive(key), True
            assert self.cache.get(key, "nothing") == ("nothing" if held is None else held.value)
            if held is None:
                self.misses += 1
            else:
                self.hits += 1
                held.reads += 1
                self.model.move_to_end(key)

    @rule(keys=st.lists(KEYS, unique=True, max_size=4))
    def get_many(self, keys: list[str]) -> None:
        held = {key: entry for key in keys if (entry := self.alive(key)) is not None}
        self.unreported |= bool(keys)
        assert self.cache.get_many(keys) == {key: entry.value for key, entry in held.items()}
        self.misses += len(keys) - len(held)
        for key, entry in held.items():
            self.hits += 1
            entry.reads += 1
            self.model.move_to_end(key)

    @rule(puts=st.lists(st.tuples(KEYS, VALUES, TAGS, st.booleans()), min_size=1, max_size=6))
    def put(self, puts: list[tuple[str, Any, set[str], bool]]) -> None:
        for key, value, tags, expires in puts:
            assert self.cache.put(key, value, 600 if expires else None, tags=tags) is True
            self.stored(key, value, tags, expires)

    @rule(values=st.dictionaries(KEYS, VALUES, max_size=6), tags=TAGS)
    def put_many(self, values: dict[str, Any], tags: set[str]) -> None:
        assert self.cache.put_many(values, tags=tags) == len(values)
        for key, value in values.items():
            self.stored(key, value, tags, expires=False)

    @rule(puts=st.lists(st.tuples(st.booleans(), KEYS, VALUES, TAGS, st.booleans()), min_size=1, max_size=4))
    def add_or_replace(self, puts: list[tuple[bool, str, Any, set[str], bool]]) -> None:
        for adds, key, value, tags, expires in puts:
            stored = (self.alive(key) is None) is adds
            put = self.cache.add if adds else self.cache.replace
            assert put(key, value, 600 if expires else None, tags=tags) is stored
            if stored:
                self.stored(key, value, tags, expires)

    @rule(key=KEYS, value=VALUES, overtaken=st.booleans())
    def put_if_version(self, key: str, value: Any, overtaken: bool) -> None:
        entry = self.cache.entry(key)
        self.reported()
        if overtaken:
            assert self.cache.put(key, "newer")
            self.stored(key, "newer", set(), expires=False)
        assert self.cache.put(key, value, if_version=0 if entry is None else entry.version) is not overtaken
        if not overtaken:
            self.stored(key, value, set(), expires=False)

    @rule(key=KEYS, expires=st.booleans())
    def touch(self, key: str, expires: bool) -> None:
        held = self.alive(key)
        assert self.cache.touch(key, 600 if expires else math.inf) is (held is not None)
        if held is not None:
            self.rewritten(key, held.value, expires)

    @rule(key=KEYS, by=st.integers(-300, 300))
    def incr(self, key: str, by: int) -> None:
        held = self.alive(key)
        if held is None:
            assert self.cache.incr(key, by) == by
            self.stored(key, by, set(), expires=False)
        elif isinstance(held.value, int) and abs(held.value + by) < 2**53:
            assert self.cache.incr(key, by) == held.value + by
            self.rewritten(key, held.value + by, held.expires)
        else:
            with pytest.raises(NoInteger):
                self.cache.incr(key, by)

    @rule(key=KEYS)
    def incr_present(self, key: str) -> None:
        held = self.alive(key)
        if held is not None and isinstance(held.value, int) and abs(held.value + 1) < 2**53:
            assert self.cache.incr(key, create=False) == held.value + 1
            self.rewritten(key, held.value + 1, held.expires)
        else:
            with pytest.raises(NoInteger):
                self.cache.incr(key, create=False)

    def rewritten(self, key: str, value: Any, expires: bool) -> None:
        """An entry got another value or TTL, and kept its tags and reads."""
        held = self.model[key]
        self.stored(key, value, set(held.tags), expires)
        self.model[key].reads = held.reads
        entry = self.cache.entry(key)
        assert entry is not None
        assert (entry.access_count, entry.ttl != math.inf) == (held.reads, expires)

    @rule(key=KEYS)
    def pop(self, key: str) -> None:
        held, self.unreported = self.alive(key), True
        assert self.cache.pop(key, "nothing") == ("nothing" if held is None else held.value)
        if held is None:
            self.misses += 1
        else:
            self.hits += 1
            self.removed(key)

    @rule(key=KEYS)
    def scan(self, key: str) -> None:
        assert sorted(self.cache.scan(batch=2)) == sorted(self.model)
        held, left_s = self.alive(key), self.cache.ttl(key)
        assert left_s == (None if held is None else pytest.approx(600, abs=300) if held.expires else math.inf)

    @rule(key=KEYS, value=VALUES)
    def get_or_compute(self, key: str, value: Any) -> None:
        held = self.alive(key)
        assert self.cache.get_or_compute(key, lambda: value) == (value if held is None else held.value)
        if held is None:
            self.misses += 1
            self.stored(key, value, set(), expires=False)
        else:
            self.unreported = True
            self.hits += 1
            held.reads += 1
            self.model.move_to_end(key)

    @rule(
        key=KEYS, tag=st.sampled_from("tu"), how=st.sampled_from(("delete", "delete", "tag", "tag", "sweep", "clear"))
    )
    def forget(self, key: str, tag: str, how: str) -> None:
        if how == "delete":
            self.deleted(key)
        elif how == "tag":
            self.cache.invalidate_tags(tag)
            for each in self.model.values():
                each.dead |= tag in each.tags
        elif how == "sweep":
            self.swept()
        else:
            self.cleared()

    @rule(key=KEYS)
    def time_passes(self, key: str) -> None:
        held = self.model.get(key)
        self.time_is_over(key, expires=held is not None and held.expires)

    @rule(key=KEYS)
    def entry(self, key: str) -> None:
        held, entry = self.alive(key), self.cache.entry(key)
        self.reported()
        assert (entry is None) == (held is None)
        if entry is not None and held is not None:
            assert (entry.value, entry.tags, entry.access_count) == (held.value, held.tags, held.reads)
            assert (entry.expires_at is not None) == held.expires

    @rule()
    def they_agree(self) -> None:
        """Compare the states. As an `@invariant`, this would report all reads before a put could report them."""
        if not self.raw.exists(self.where.meta):
            return
        keys = self.cache.keys()
        self.reported()
        assert keys == list(self.model)
        stats = self.cache.stats()
        assert (stats.size, stats.hits, stats.misses) == (len(self.model), self.hits, self.misses)
        assert stats.evictions == self.evictions
        assert faults(self.raw, self.backend.namespace, "cache", "m") == []


@examples(4, 50)
def test_any_sequence_of_operations_matches_the_model(
    server: Server, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    run(LRUMachine, server, monkeypatch, examples)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "line", "instead"),
    [
        ("put", "if verb == 'add' then failed = present and -7 or 0", "if verb == 'add' then failed = 0"),
        ("put", "0) ~= tonumber(operand) and -7 or 0", "0) ~= tonumber(operand) and 0 or 0"),
        ("put", "math.max(1, old.left_ms) or 0", "0 or 0"),
        ("put", "if old then packed = I.pack_size(hits, weight) end", ""),
        ("pop", "if I.call('HEXISTS', SIZE, KEY) == 1 then I.remove(KEY) end", ""),
        ("put", "if written <= newest then return nil end", ""),
        ("put", "  else failed = -7 end", "  else number = tonumber(operand) end"),
    ],
)
def test_script_fault_fails_the_check(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, line: str, instead: str
) -> None:
    alter(monkeypatch, f"cache/{name}", line, instead)
    with pytest.raises((AssertionError, ExceptionGroup, NoInteger)):  # NoInteger: `incr` found a wrong value
        run(LRUMachine, server, monkeypatch, examples=500)
