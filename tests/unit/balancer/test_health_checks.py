"""Active checks of a pool with several shards, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.balancer import AgentInstance
from agentperf_redis.balancer.commands import Claimed, Pool
from agentperf_redis.balancer.health_checks import Checking, Claims
from agentperf_redis.balancer.layouts import Layout
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable

SHARDS = [Pool.of("n", "coder", number, 3) for number in range(3)]
AWAY = BackendUnavailable("redis://node", "not_applied", "no answer")


class OwnClock:
    def before_deadline(self, pool: Pool, request: Any) -> Flow[Any]:
        return (yield from request(0))


@pytest.fixture
def checking() -> Checking:
    unused: Any = None
    clock: Any = OwnClock()
    return Checking(unused, clock, Pool.of("n", "coder"), bool, 1.0, 1.0)


def run(flow: Flow[Any], answers: dict[Pool, Any]) -> tuple[Any, list[Pool]]:
    """Run a flow. Returns its result or error, and the shards in the order in which it sent requests to them."""
    sent = []
    try:
        step: Any = next(flow)
        while True:
            shard = next(each for each in SHARDS if each.keys.state == step.keys[0])
            sent.append(shard)
            answer = answers[shard]
            step = flow.throw(answer) if isinstance(answer, Exception) else flow.send(answer)
    except StopIteration as end:
        return end.value, sent
    except BackendUnavailable as error:
        return error, sent


def claimed(name: str) -> Claimed:
    return Claimed(1, 1.0, (AgentInstance(name, "coder"),))


@pytest.mark.parametrize("lost", SHARDS)
def test_unreachable_shard_does_not_stop_the_claims_of_others(checking: Checking, lost: Pool) -> None:
    layout = Layout(SHARDS, keys.key_slot)
    answers = {shard: AWAY if shard is lost else claimed(str(shard.shard)) for shard in SHARDS}
    claims, sent = run(checking._claim_in(layout), answers)
    assert set(sent) == set(SHARDS)
    assert {each.id for each in claims.instances} == {str(each.shard) for each in SHARDS if each is not lost}
    assert layout.is_away(lost)


def test_claim_fails_when_no_shard_answers(checking: Checking) -> None:
    def same_node(key: str) -> str:
        return ""

    error, sent = run(checking._claim_in(Layout(SHARDS, same_node)), dict.fromkeys(SHARDS, AWAY))
    assert error is AWAY
    assert len(sent) == 1, "it waits only once for a node"


def test_results_reach_all_shards_that_answer(checking: Checking) -> None:
    claims = Claims(tuple((shard, claimed(str(shard.shard))) for shard in SHARDS))
    results = {each.id: True for each in claims.instances}
    error, sent = run(checking.report(claims, results), {SHARDS[0]: AWAY, SHARDS[1]: None, SHARDS[2]: None})
    assert error is AWAY
    assert sent == SHARDS
