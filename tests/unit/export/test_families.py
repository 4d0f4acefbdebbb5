from __future__ import annotations

import re

from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.export import families
from agentperf_redis.export.families import FAMILIES, Durations, FamilyKind, values
from agentperf_redis.export.reading import Reading
from tests.support.readings import BUCKETS, reading


def found(family: families.Family, reading: Reading) -> dict[tuple[str, ...], object]:
    (samples,) = [samples for each, samples in values(reading) if each is family]
    assert len({labels for labels, _ in samples}) == len(samples), "two samples have the same labels"
    return dict(samples)


def test_names_follow_the_conventions() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert re.fullmatch("agentperf(_[a-z]+)+", family.name)
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket", "_info_info"))
        assert family.unit == "" or family.name.endswith(f"_{family.unit}")
        assert family.meaning.endswith(".")
        assert not re.search(r'["\\\n]', family.meaning)
        assert not {"le", "job", "instance", "__name__"} & set(family.labels), "Prometheus sets these itself"


def test_every_sample_has_the_labels_of_its_family() -> None:
    for family, samples in values(reading("a", "b")):
        assert samples, family.name
        for labels, value in samples:
            assert len(labels) == len(family.labels)
            assert isinstance(value, Durations) == (family.kind is FamilyKind.HISTOGRAM)


def test_models_and_the_rest_add_up_to_the_agent() -> None:
    tokens = found(families.TOKENS, reading("a"))
    assert tokens == {
        ("a", "gpt-x", "input"): 900,
        ("a", "gpt-x", "output"): 250,
        ("a", "", "input"): 100,
        ("a", "", "output"): 50,
    }
    assert found(families.COST, reading("a")) == {("a", "gpt-x"): 2.0, ("a", ""): 0.500000001}


def test_agent_without_models_has_its_usage_under_an_empty_name() -> None:
    tokens = found(families.TOKENS, reading("a", "b"))
    assert tokens["b", "", "input"] == 1000
    assert ("b", "gpt-x", "input") not in tokens


def test_durations_are_those_stored() -> None:
    durations = found(families.DURATIONS, reading("a"))["a",]
    assert durations == Durations(123_456_789, 2, BUCKETS, 0, 40_000_000_000)


def test_lru_cache_has_one_tier() -> None:
    entries = found(families.CACHE_ENTRIES, reading("a"))
    assert {labels[2] for labels in entries if labels[1] == "lru"} == {"cold"}
    assert {labels[2] for labels in entries if labels[1] == "tiered"} == {"hot", "warm", "cold"}


def test_states_of_instances_add_up() -> None:
    states = found(families.POOL_INSTANCES, reading("a"))
    assert sum(number for number in states.values() if isinstance(number, int)) == 2
    assert (states["a", "up"], states["a", "ejected"], states["a", "down"]) == (1, 1, 0)


def test_unread_part_is_marked() -> None:
    assert found(families.PART_READ, reading("a")) == {("agents",): 1, ("caches",): 1, ("pools",): 0}
    assert found(families.UP, reading("a")) == {(): 1}
    absent = Reading("n", "1", took={"agents": 0.1}, errors={"agents": BackendUnavailable("x", "unknown", "gone")})
    assert found(families.UP, absent) == {(): 0}
    assert found(families.PART_READ, absent) == {("agents",): 0}
