from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis import keys
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.keys import key_slot

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=200)


@given(names, names)
def test_distinct_names_get_one_slot_each(one: str, other: str) -> None:
    pool = keys.pool("ns", one)
    assert (pool.state == keys.pool("ns", other).state) == (one == other)
    parts = [pool.state, pool.ready, pool.due, pool.waitq, pool.ring, pool.ready_with(other)]
    cache = keys.cache("ns", "cache", one)
    assert len({key_slot(key) for key in parts}) == 1
    assert len({key_slot(key) for key in (cache.meta, cache.entry(other), cache.lease(other), cache.bus)}) == 1
    assert keys.decoded(keys.encoded(one)) == one


@given(names, names)
def test_absent_key_lies_in_the_slot_of_any_key(one: str, other: str) -> None:
    cache = keys.cache("ns", "cache", one)
    for key in (keys.pool("ns", one).state, cache.entry(other), keys.metrics_total("ns", 3, one), keys.meta("ns")):
        assert key_slot(keys.absent(key)) == key_slot(key)
        assert keys.absent(key).startswith("ns:"), "the pattern of the ACL user matches it"
    assert keys.absent(cache.entry(other)) == keys.absent(cache.meta) == f"{cache.tag}:absent"


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_entry_names_of_different_keys_differ(one: str, other: str) -> None:
    assert (keys.stored_name(one) == keys.stored_name(other)) == (one == other)


@given(st.text(st.characters(codec="utf-8"), min_size=31).filter(lambda key: len(key.encode()) > 120))
def test_shortened_name_stands_for_its_long_key(key: str) -> None:
    name = keys.stored_name(key)
    assert name != key
    assert keys.is_shortened(name)
    assert keys.stored_name(name) == name
    assert 120 < len(name.encode()) < 300


@pytest.mark.parametrize(
    "key",
    [f"{'x' * 41}…{'0' * 64}:{'1' * 20}", f"{'x' * 40}…{'g' * 64}:{'1' * 20}", f"{'x' * 40}…{'0' * 64}:{'1' * 19}"],
)
def test_key_unlike_a_shortened_name_is_shortened(key: str) -> None:
    assert keys.stored_name(key) != key


def test_short_keys_are_stored_as_they_are() -> None:
    assert [keys.stored_name(key) for key in ("", "a", "名" * 40)] == ["", "a", "名" * 40]
    assert not keys.is_shortened("x" * 120)


@pytest.mark.parametrize("namespace", ["", "a b", "{x}", "a:b", "é", "x" * 65, "a\n", None, 5])
def test_invalid_namespaces_are_refused(namespace: object) -> None:
    with pytest.raises(InvalidArgument, match="namespace is"):
        keys.check_namespace("namespace", namespace)


def test_agent_keeps_its_metrics_shard() -> None:
    assert keys.metrics_shard("research") == 2
    assert keys.metrics_total("agentperf", 2, keys.metrics_series("a b")) == "agentperf:{metrics:02}:total:a%20b"


def tags_of(count: int) -> list[tuple[str, ...]]:
    """Return the tags of the shards of a pool, and the tags of the shards of a cache."""
    pools = tuple(keys.pool("n", "a#b", number, count).tag for number in range(count))
    return [pools, tuple(where.tag for where in keys.cache_shards("n", "cache", "a#b", count))]


@pytest.mark.parametrize("count", [2, 3, 8, 16, 256])
def test_shards_are_spread_over_equal_ranges_of_slots(count: int) -> None:
    for tags in tags_of(count):
        slots = list(map(key_slot, tags))
        assert [each * count // keys.SLOTS for each in slots] == list(range(count))
        for nodes in (2, 3, 4, 5, 6):
            held = Counter(each * nodes // keys.SLOTS for each in slots)
            assert max(held.values()) <= -(-count // nodes) + 1
        assert max(Counter(each * 3 // keys.SLOTS for each in slots).values()) <= -(-count // 3) + (count > 16)


def test_keys_of_other_numbers_of_shards_differ() -> None:
    for tags in zip(*map(tags_of, (1, 2, 4, 8)), strict=True):
        all_tags = [tag for some in tags for tag in some]
        assert len(set(all_tags)) == len(all_tags)
        assert {keys.whole_resource(tag.partition("{")[2].rstrip("}")).partition(":")[2] for tag in all_tags} == {
            "a%23b"
        }
    assert [tags[0] for tags in tags_of(1)] == ["n:{lb:a%23b}", "n:{cache:a%23b}"]
