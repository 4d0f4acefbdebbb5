"""Slots that are moved key by key while all three services use them (CLUSTER SETSLOT, MIGRATE).

While a slot is moved, its keys are on two nodes, and a script on either node misses some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, keys
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.keys import key_slot
from agentperf_redis.transport import delivery, resp
from tests.support.servers import Node, Servers, wait_until
from tests.support.slot_moves import SlotMover

TIMEOUT = 60.0
BRIEF_S = 2.0
"""Deadline of the calls that are expected to fail, s. A busy machine may take a good part of it for one request."""
EARLY_S = 0.3
"""Time given to a call that must wait for the end of the move, s. A call that does not wait ends within it."""


pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module", params=["cluster", "cluster82"])
def cluster(request: pytest.FixtureRequest, servers: Servers) -> Iterator[SlotMover]:
    server = servers.fresh(request.param)
    made = SlotMover(server)
    yield made
    made.close()
    server.stop()


@pytest.fixture
def mover(cluster: SlotMover) -> Iterator[SlotMover]:
    yield cluster
    cluster.finish_all()


@pytest.fixture
def connected(cluster: SlotMover, namespace: str) -> Iterator[Callable[..., AgentPerf]]:
    """Connect to the server as a separate process would: `connected(deadline=60)`."""
    made: list[AgentPerf] = []

    def connect(deadline: float = TIMEOUT) -> AgentPerf:
        made.append(AgentPerf(cluster.server.url, namespace=namespace, deadline=deadline))
        return made[-1]

    yield connect
    for each in made:
        each.close()


class HalfMoved:
    """A slot that is half moved: some of its keys are on another node."""

    def __init__(self, mover: SlotMover, tag: str, moved: Callable[[str], bool]) -> None:
        self._mover = mover
        self.slot = key_slot(f"{tag}:")
        self.source = mover.owners[self.slot]
        self.target = mover.next_after(self.source)
        names = mover.keys(self.slot)
        chosen = [name for name in names if moved(name.removeprefix(f"{tag}:"))]
        assert 0 < len(chosen) < len(names), names
        mover.open(self.slot, self.target)
        mover.migrate(self.slot, self.target, *chosen)

    def keys(self) -> dict[Node, set[str]]:
        found = {}
        for node in (self.source, self.target):
            with node.client() as client:
                found[node] = set(client.execute_command("CLUSTER", "GETKEYSINSLOT", self.slot, 1000))
        return found

    def finish(self) -> None:
        self._mover.finish(self.slot, self.target)


def asked(mover: SlotMover) -> int:
    """Return how many commands a client sent to the new node of a slot that is being moved."""
    count = 0
    for node in mover.nodes:
        with node.client() as client:
            count += client.info("commandstats").get("cmdstat_asking", {}).get("calls", 0)
    return count


def counted(perf: AgentPerf, agent: str, count: int) -> None:
    for _ in range(count):
        with perf.metrics.track(agent), perf.metrics.span(agent, "step"):
            pass
    perf.metrics.flush()


def shard_tag(namespace: str, agent: str) -> str:
    return keys.metrics_tag(namespace, keys.metrics_shard(agent))


def test_windowed_read_waits_for_the_whole_slot(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str
) -> None:
    assert windowed_read_of_half_moved_slot(mover, connected, namespace, EARLY_S) == 20


def test_mutant_that_follows_ask_reads_too_little(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above detects a client that sends scripts to a node without all keys of the slot."""
    for module in (delivery, resp):
        monkeypatch.setattr(module, "needs_whole_slot", lambda _: False)
    assert windowed_read_of_half_moved_slot(mover, connected, namespace, TIMEOUT) == 0


def windowed_read_of_half_moved_slot(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str, early_s: float
) -> int:
    """Return how many of 20 executions a read counts in a half-moved slot. The move goes on after `early_s` seconds."""
    counted(connected(), "planner", 20)
    reader = connected()
    assert reader.metrics.snapshots(window="1h")["planner"].task_count == 20
    # The script declares the keys `agents` and `settings`, which are on the new node. The slices are on the old node.
    half = HalfMoved(mover, shard_tag(namespace, "planner"), lambda part: part in ("agents", "settings"))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.metrics.snapshots, window="1h")
        ends_early(reading, early_s)
        half.finish()
        return reading.result(TIMEOUT)["planner"].task_count


def ends_early(call: Future[Any], early_s: float = EARLY_S) -> bool:
    """Return whether a call ends within `early_s` seconds, so while the slot is still half moved."""
    try:
        call.exception(early_s)
    except TimeoutError:
        return False
    return True


def test_flush_creates_no_key_on_the_new_node(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str
) -> None:
    """If a flush created a key on the new node, MIGRATE would fail with BUSYKEY."""
    perf = connected()
    counted(perf, "planner", 100)
    recorded = perf.metrics.delivery().recorded
    slices = ("10s", "1m", "1h", "1d")
    half = HalfMoved(mover, shard_tag(namespace, "planner"), lambda part: part.partition(":")[0] not in slices)
    before = half.keys(), asked(mover)
    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(counted, perf, "planner", 50)
        assert not ends_early(flushing)
        assert (half.keys(), asked(mover)) == before
        half.finish()
        flushing.result(TIMEOUT)
    assert connected().metrics.snapshots(window="1h")["planner"].task_count == 150
    assert perf.metrics.get_or_create_metrics("planner").task_count == 150
    assert perf.metrics.delivery().counted == perf.metrics.delivery().recorded > recorded


@pytest.mark.parametrize("part", ["total:planner/step", "agents"])
def test_forget_removes_all_or_nothing(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str, part: str
) -> None:
    counted(connected(), "planner", 20)
    tag = shard_tag(namespace, "planner")
    perf, patient = connected(deadline=BRIEF_S), connected()
    half = HalfMoved(mover, tag, lambda name: name == part)
    before = half.keys()
    with pytest.raises(BackendUnavailable, match="the slot is being moved") as caught:
        perf.metrics.forget("planner")
    assert caught.value.outcome == "not_applied"
    assert half.keys() == before
    half.finish()
    assert patient.metrics.forget("planner")
    own = [name.removeprefix(f"{tag}:") for name in mover.keys(half.slot) if name.startswith(tag)]
    left = {name.partition(":")[0] for name in own}
    assert left <= {"settings", "w", "10s", "1m", "1h", "1d"}
    assert "planner" not in patient.metrics.snapshots()


@pytest.mark.parametrize("part", ["state", "due"])
def test_release_and_waiter_finish_after_the_move(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str, part: str
) -> None:
    perf = connected()
    balancer = perf.balancer()
    for name in ("a", "b"):
        balancer.register_instance(AgentInstance(id=name, agent_type="coder", max_capacity=1))
    held = balancer.acquire("coder")
    other = connected().balancer()
    half = HalfMoved(mover, keys.pool(namespace, "coder").tag, lambda name: name == part)
    with ThreadPoolExecutor(3) as pool:
        acquiring = [pool.submit(other.acquire, "coder", wait=TIMEOUT) for _ in range(2)]
        releasing = pool.submit(balancer.release, held)
        assert not ends_early(releasing)
        half.finish()
        assert releasing.result(TIMEOUT)
        leased = [each.result(TIMEOUT) for each in acquiring]
    assert {each.id for each in leased if each is not None} == {"a", "b"}
    assert all(other.release(each) for each in leased)
    assert balancer.status("coder")[0].current_load == 0
    assert balancer.repair("coder").wrong == 0


def test_failed_release_is_repeated_after_the_move(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str
) -> None:
    balancer = connected(deadline=BRIEF_S).balancer()
    balancer.register_instance(AgentInstance(id="a", agent_type="coder", max_capacity=1))
    held = balancer.acquire("coder", ttl=600)
    half = HalfMoved(mover, keys.pool(namespace, "coder").tag, lambda name: name == "state")
    with pytest.raises(BackendUnavailable) as caught:
        balancer.release(held)
    assert caught.value.outcome == "not_applied"
    half.finish()
    patient = connected().balancer()
    wait_until(lambda: patient.status("coder")[0].current_load == 0, "the release")


def test_lease_is_renewed_during_a_move(mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str) -> None:
    """A renewal uses a single key, so it is correct on the node that has this key."""
    perf = connected()
    balancer = perf.balancer()
    balancer.register_instance(AgentInstance(id="a", agent_type="coder", max_capacity=1))
    tag = keys.pool(namespace, "coder").tag
    with balancer.lease("coder", ttl=12.0) as lease:
        half = HalfMoved(mover, tag, lambda name: name == "due")

        def expiry() -> float:
            """Return when the lease expires, read from the new node of its slot."""
            with half.target.client() as client, client.pipeline(transaction=False) as asking:
                asking.execute_command("ASKING").zscore(f"{tag}:due", lease.token)
                return float(asking.execute()[1])

        first = expiry()
        wait_until(lambda: expiry() > first, "a renewal")
        half.finish()
        lease.check()


def test_cached_values_stay_readable_during_a_move(
    mover: SlotMover, connected: Callable[..., AgentPerf], namespace: str
) -> None:
    """Reads are plain commands, for which the server checks each key. Writes wait for the end of the move."""
    cache = connected().cache("answers")
    cache.put_many({"moved": 1, "left": 2})
    cache.invalidate_tags("none")  # creates the key `epochs`; each read uses this key
    assert cache.get_many(["moved", "left"]) == {"moved": 1, "left": 2}
    brief = connected(deadline=BRIEF_S).cache("answers")
    half = HalfMoved(mover, keys.cache(namespace, "cache", "answers").tag, lambda part: part in ("e:moved", "epochs"))
    before = half.keys()
    assert cache.get("moved") == 1
    assert asked(mover) > 0
    for write in (lambda: brief.put("left", 3), brief.clear):
        with pytest.raises(BackendUnavailable):
            write()
    assert half.keys() == before
    half.finish()
    # In the background, the client sends the failed `clear` again.
    wait_until(lambda: cache.get_many(["moved", "left"]) == {}, "the failed clear to be sent again")
