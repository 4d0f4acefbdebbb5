"""Layouts: in which shard an instance lies, and in which order calls try the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis import keys, random_numbers
from agentperf_redis.balancer import layouts as module
from agentperf_redis.balancer.commands import Pool, PoolIsDivided
from agentperf_redis.balancer.layouts import Layout, Layouts, over_shards
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable


def layout(count: int) -> Layout:
    return Layout([Pool.of("n", "coder", number, count) for number in range(count)])


class NoBackend:
    namespace = "n"

    def node_of(self, key: str) -> int:
        return keys.key_slot(key) * 3 // keys.SLOTS


@pytest.fixture
def layouts() -> Layouts:
    backend: Any = NoBackend()
    return Layouts(backend)


def test_instances_are_spread_over_shards() -> None:
    found = layout(8)
    homes = Counter(found.home(f"i{number}").shard for number in range(1000))
    assert set(homes) == set(range(8))
    assert max(homes.values()) < 200
    assert layout(1).home("anything") is layout(1).shards[0]


def test_better_of_two_random_shards_comes_first() -> None:
    found = layout(4)
    random_numbers.seed(1)
    for shard, load in zip(found.shards, (9, 5, 7, 1), strict=True):
        found.hear(shard, load, 10)
    firsts = Counter(next(found.in_order()).shard for _ in range(6000))
    # Each draw compares two of the four shards. Half of the draws contain the freest shard, which then comes first. The
    # fullest shard never comes first.
    assert 2800 < firsts[3] < 3200
    assert firsts[0] == 0
    assert firsts[1] > firsts[2] > 800
    order = [each.shard for each in found.in_order()]
    assert sorted(order) == [0, 1, 2, 3]
    rest = [shard for shard in (3, 1, 2, 0) if shard != order[0]]
    assert order[1:] == rest


def test_shares_are_compared_not_free_units() -> None:
    found = layout(2)
    found.hear(found.shards[0], 90, 100)
    found.hear(found.shards[1], 1, 4)
    assert [each.shard for each in found.in_order()] == [1, 0]


def test_affinity_leads_to_one_shard_first() -> None:
    found = layout(8)
    for affinity in ("a", "b", "c"):
        assert len({next(found.in_order(affinity)).shard for _ in range(20)}) == 1


def test_unreachable_shard_comes_last_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    found = layout(3)
    found.lose(found.shards[1])
    assert all(list(found.in_order())[-1].shard == 1 for _ in range(20))
    found.hear(found.shards[1], 0, 10)
    assert found.free_share(found.shards[1]) == 1.0
    found.lose(found.shards[1])
    monkeypatch.setattr(module, "_AWAY_S", 0.0)
    found.lose(found.shards[1])
    assert found.free_share(found.shards[1]) == 1.0


def test_old_reports_count_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = layout(3)
    for shard in found.shards:
        found.hear(shard, 5, 10)
    found.full(found.shards[1])
    assert {next(found.in_order()).shard for _ in range(50)} == {0, 2}
    monkeypatch.setattr(module, "_HEARD_S", -1.0)
    assert {next(found.in_order()).shard for _ in range(50)} == {0, 1, 2}


def test_shards_of_an_unreachable_node_come_last(layouts: Layouts) -> None:
    found = layouts.learn("coder", 9)
    found.lose(found.shards[4])
    assert [found.is_away(each) for each in found.shards] == [False] * 3 + [True] * 3 + [False] * 3
    assert {each.shard for each in list(found.in_order())[-3:]} == {3, 4, 5}


def test_own_releases_are_counted_until_the_next_reply() -> None:
    found = layout(2)
    shard = found.shards[0]
    found.released(shard)  # has no effect before the first reply of the shard
    assert found.free_share(shard) == 1.0
    found.hear(shard, 3, 10)
    found.released(shard)
    assert found.free_share(shard) == pytest.approx(0.8)
    found.hear(shard, 3, 0)
    assert found.free_share(shard) == 0.0
    found.full(shard)
    assert found.free_share(shard) == 0.0


@pytest.mark.parametrize("count", [1, 3, 8, 100, 500])
def test_split_covers_the_count(count: int) -> None:
    found = layout(8)
    for shard in found.shards:
        found.hear(shard, 10 * shard.shard, 80)
    parts = list(found.split(count))
    assert sum(number for _, number in parts) == count
    assert all(number > 0 for _, number in parts)
    assert len(parts) == {1: 1, 3: 1, 8: 2, 100: 8, 500: 8}[count]
    if len(parts) > 1:
        assert parts[0][0].shard == 0
    if count == 500:
        assert parts[0][1] > 4 * parts[-1][1]


def test_shards_of_another_layout_are_ignored() -> None:
    found, other = layout(2), layout(8)
    found.hear(other.shards[7], 1, 2)
    found.released(other.shards[7])
    found.lose(other.shards[1])
    found.full(other.shards[0])
    assert [found.free_share(each) for each in found.shards] == [1.0, 1.0]


def test_split_uses_one_shard_of_a_large_pool() -> None:
    found = layout(16)
    assert len(list(found.split(16))) == 1, "nothing was heard yet"
    for shard in found.shards:
        found.hear(shard, 0, 5000)
    assert len(list(found.split(300))) == 1


def run(flow: Flow[Any], *answers: object) -> tuple[Any, list[Any]]:
    """Run a flow with these answers to its steps. Returns its result and its steps."""
    steps: list[Any] = []
    replies: Iterator[Any] = iter(answers)
    try:
        step = next(flow)
        while True:
            steps.append(step)
            step = flow.send(next(replies))
    except StopIteration as end:
        return end.value, steps


def test_refusal_teaches_the_number_of_shards(layouts: Layouts) -> None:
    pool = Pool.of("n", "coder")
    seen: list[int] = []

    def flow(over: Layout) -> Flow[int]:
        seen.append(len(over.shards))
        if len(over.shards) == 1:
            raise PoolIsDivided("coder", 4)
        yield from ()
        return 7

    assert run(over_shards(layouts, pool, flow)) == (7, [])
    assert seen == [1, 4]
    assert len(layouts.of(pool).shards) == 4


def test_number_is_read_again_when_nothing_is_found(layouts: Layouts) -> None:
    pool = Pool.of("n", "coder")
    layouts.learn("coder", 4)
    seen: list[int] = []

    def flow(over: Layout) -> Flow[int | None]:
        seen.append(len(over.shards))
        yield from ()
        return 1 if len(over.shards) == 2 else None

    result, steps = run(over_shards(layouts, pool, flow), 2)
    assert (result, seen) == (1, [4, 2])
    assert [step.script for step in steps] == ["HGET"]
    layouts.learn("coder", 4)
    result, _ = run(over_shards(layouts, pool, flow), 4)
    assert result is None
    layouts.learn("coder", 1)
    result, steps = run(over_shards(layouts, pool, flow))
    assert (result, steps) == (None, []), "a pool of one shard costs no further request"
    _, steps = run(over_shards(layouts, pool, flow, plain=True), 1)
    assert len(steps) == 1


def test_result_stands_when_the_number_cannot_be_read(layouts: Layouts) -> None:
    layouts.learn("coder", 4)

    def flow(over: Layout) -> Flow[None]:
        yield from ()

    running = over_shards(layouts, Pool.of("n", "coder"), flow)
    next(running)
    with pytest.raises(StopIteration) as end:
        running.throw(BackendUnavailable("redis://node", "not_applied", "no answer"))
    assert end.value.value is None


def test_pool_that_changes_without_end_is_given_up(layouts: Layouts) -> None:
    def flow(over: Layout) -> Flow[None]:
        yield from ()
        raise PoolIsDivided("coder", len(over.shards) + 1)

    with pytest.raises(PoolIsDivided):
        run(over_shards(layouts, Pool.of("n", "coder"), flow))


def test_known_layouts_are_bounded(layouts: Layouts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_KNOWN", 10)
    for number in range(100):
        layouts.of(Pool.of("n", f"pool{number}"))
        layouts.learn(f"divided{number}", 2)
    assert len(layouts._known) <= 10
