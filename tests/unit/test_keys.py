from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis import keys
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.transport.topology import key_slot

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


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_entry_names_of_different_keys_differ(one: str, other: str) -> None:
    assert (keys.stored_name(one) == keys.stored_name(other)) == (one == other)


def test_short_key_cannot_imitate_a_long_key() -> None:
    long = "x" * 121
    imitation = keys.stored_name(long)
    assert len(imitation.encode()) > 120
    assert keys.stored_name(imitation) != imitation
    assert len(keys.stored_name("名" * 10**5).encode()) < 300


@pytest.mark.parametrize("namespace", ["", "a b", "{x}", "a:b", "é", "x" * 65, "a\n", None, 5])
def test_invalid_namespaces_are_refused(namespace: object) -> None:
    with pytest.raises(InvalidArgument, match="namespace is"):
        keys.check_namespace("namespace", namespace)


def test_agent_keeps_its_metrics_shard() -> None:
    assert keys.metrics_shard("research") == 2
    assert keys.metrics_total("agentperf", 2, keys.metrics_series("a b")) == "agentperf:{metrics:02}:total:a%20b"
