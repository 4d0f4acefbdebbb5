"""The server's clock is set back by an hour. Stored times that now lie in the future must not disturb the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis import AgentInstance, PoolSettings
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import LoadBalancingStrategy, Outcome, commands
from agentperf_redis.balancer.commands import Granted, Pool, Queued, Rates, Refused
from tests.support import records
from tests.support.clock import server_ms, set_back_pool
from tests.support.servers import Raw, Server, wait_until

HOUR = 3600
TTL_MS = 30_000
SHORT_MS = 400


@pytest.fixture
def pool(backend: Backend) -> Pool:
    return Pool.of(backend.namespace, "planner")


def register(backend: Backend, pool: Pool, capacity: int = 1, **options: Any) -> None:
    instance = AgentInstance("p0", "planner", max_capacity=capacity)
    backend.run(
        commands.register(pool, instance, options.pop("strategy", None), options.pop("heartbeat", 0), **options)
    )


def acquire(backend: Backend, pool: Pool, token: str, ttl_ms: int = TTL_MS) -> Any:
    return backend.run(commands.acquire(pool, token, ttl_ms, commands.ANY))


def wait(pool: Pool, token: str) -> Any:
    none = frozenset[str]()
    return commands.wait(pool, token, ttl_ms=TTL_MS, live_ms=3000, boost_ms=0, require=none, position="-")


CALLS: dict[str, Callable[[Pool], Any]] = {
    "acquire": lambda pool: commands.acquire(pool, "@other", TTL_MS, commands.ANY),
    "wait": lambda pool: wait(pool, "@other"),
    "select": lambda pool: commands.select(pool, commands.ANY),
    "status": lambda pool: commands.status(pool, 0, 10),
    "repair": lambda pool: commands.repair(pool, 0, 10),
}


@pytest.mark.thorough
@pytest.mark.parametrize("call", CALLS)
def test_unit_of_a_dead_holder_is_free_after_its_ttl(backend: Backend, raw: Raw, pool: Pool, call: str) -> None:
    register(backend, pool)
    assert isinstance(acquire(backend, pool, "@dead", SHORT_MS), Granted)
    set_back_pool(raw, pool.keys, HOUR)

    backend.run(CALLS[call](pool))
    assert raw.zscore(pool.keys.due, "@dead") <= server_ms(raw) + SHORT_MS

    wait_until(lambda: isinstance(acquire(backend, pool, "@new"), Granted), "the unit to be free")


def test_renewal_sets_the_ttl_from_now(backend: Backend, raw: Raw, pool: Pool) -> None:
    register(backend, pool)
    acquire(backend, pool, "@held")
    set_back_pool(raw, pool.keys, HOUR)
    assert backend.run(commands.renew(pool, ["@held"], TTL_MS)) == frozenset()
    assert raw.zscore(pool.keys.due, "@held") <= server_ms(raw) + TTL_MS


def test_lease_acquired_again_ends_within_its_ttl(backend: Backend, raw: Raw, pool: Pool) -> None:
    register(backend, pool)
    first = acquire(backend, pool, "@held")
    set_back_pool(raw, pool.keys, HOUR)
    again = acquire(backend, pool, "@held")
    assert again.fence == first.fence + HOUR * 10**6
    assert again.expiry_ms <= server_ms(raw) + TTL_MS


def test_leases_of_other_ttls_are_kept(backend: Backend, raw: Raw, pool: Pool) -> None:
    register(backend, pool, capacity=2)
    acquire(backend, pool, "@long", HOUR * 1000)
    due = raw.zscore(pool.keys.due, "@long")
    acquire(backend, pool, "@short", TTL_MS)
    assert isinstance(acquire(backend, pool, "@refused"), Refused)
    backend.run(commands.repair(pool, 0, 10))
    assert raw.zscore(pool.keys.due, "@long") == due


def test_waiters_keep_their_order(backend: Backend, raw: Raw, pool: Pool) -> None:
    register(backend, pool)
    acquire(backend, pool, "@held")
    first = backend.run(wait(pool, "@first"))
    set_back_pool(raw, pool.keys, HOUR)
    assert backend.run(wait(pool, "@first")).ahead == 0
    second = backend.run(wait(pool, "@second"))
    assert isinstance(second, Queued)
    assert second.ahead == 1
    assert int(second.position) > int(first.position)


@pytest.mark.parametrize("call", ["acquire", "status", "repair"])
def test_rest_keeps_its_length(backend: Backend, raw: Raw, pool: Pool, call: str) -> None:
    register(backend, pool)
    backend.run(commands.cool_down(pool, "p0", 20_000, "cooled_down"))
    set_back_pool(raw, pool.keys, HOUR)
    backend.run(CALLS[call](pool))
    assert raw.zscore(pool.keys.due, "C:p0") <= server_ms(raw) + 20_000
    page = backend.run(commands.status(pool, 0, 10))
    assert page is not None
    assert 0 < page.instances[0].resting_for <= 20
    backend.run(commands.cool_down(pool, "p0", 30_000, "cooled_down"))
    assert raw.zscore(pool.keys.due, "C:p0") <= server_ms(raw) + 30_000


def test_ejection_lasts_at_most_its_maximum(backend: Backend, raw: Raw, pool: Pool) -> None:
    settings = PoolSettings(eject_after=1, base_ejection_time=20.0, max_ejection_time=40.0)
    register(backend, pool, settings=settings)
    backend.run(commands.register(pool, AgentInstance("p1", "planner"), None, 0))
    token = "@bad"
    bad = acquire(backend, pool, token).facts[0]
    backend.run(commands.release(pool, token, outcome=Outcome.ERROR))
    set_back_pool(raw, pool.keys, HOUR)
    page = backend.run(commands.status(pool, 0, 10))
    assert page is not None
    (ejected,) = (each for each in page.instances if each.instance.id == bad)
    assert 0 < ejected.ejected_for <= settings.max_ejection_time


def test_lease_from_before_is_no_probe(backend: Backend, raw: Raw, pool: Pool) -> None:
    """Fencing tokens are times. After the clock is set back, old tokens lie in the future. Old leases are no probes."""
    register(backend, pool, capacity=3, settings=PoolSettings(eject_after=1))
    backend.run(commands.register(pool, AgentInstance("p1", "planner", max_capacity=3), None, 0))
    held = [f"@held:{number}" for number in range(4)]
    where = {token: acquire(backend, pool, token).facts[0] for token in held}
    bad, old = [token for token in held if where[token] == "p0"][:2]
    set_back_pool(raw, pool.keys, HOUR)
    backend.run(commands.release(pool, bad, outcome=Outcome.ERROR))
    assert "ejected" in records.flags(raw.hget(pool.keys.state, "p0"))
    backend.run(commands.release(pool, old, outcome=Outcome.OK))
    assert "ejected" in records.flags(raw.hget(pool.keys.state, "p0")), "an old success does not end the ejection"


def test_rate_limit_recovers_as_soon_as_before(backend: Backend, raw: Raw, pool: Pool) -> None:
    register(backend, pool, capacity=9, rates=Rates(60, 60), settings=PoolSettings(rate_burst=0.0))
    assert isinstance(acquire(backend, pool, "@first"), Granted)  # the next lease is allowed a second later
    set_back_pool(raw, pool.keys, HOUR)
    wait_until(lambda: isinstance(acquire(backend, pool, "@second"), Granted), "the rate limit to recover")


def test_checks_go_on(backend: Backend, raw: Raw, pool: Pool) -> None:
    register(backend, pool, settings=PoolSettings(unhealthy_threshold=1))
    claimed = backend.run(commands.claim_checks(pool, SHORT_MS, 10))
    backend.run(commands.report_checks(pool, claimed.at_ms, [("p0", True)]))
    set_back_pool(raw, pool.keys, HOUR)
    found = backend.run(commands.claim_checks(pool, SHORT_MS, 10))
    assert found.next_after <= SHORT_MS / 1000
    wait_until(lambda: backend.run(commands.claim_checks(pool, SHORT_MS, 10)).instances, "the check to be due")
    backend.run(commands.report_checks(pool, server_ms(raw), [("p0", False)]))
    assert "down" in records.flags(raw.hget(pool.keys.state, "p0"))


def test_response_times_stay_plausible(backend: Backend, raw: Raw, pool: Pool) -> None:
    register(backend, pool, capacity=3, strategy=LoadBalancingStrategy.PEAK_EWMA)
    for number, seconds in enumerate((0.5, 0.1)):
        acquire(backend, pool, f"@{number}")
        backend.run(commands.release(pool, f"@{number}", outcome=Outcome.OK, response_time=seconds))
        set_back_pool(raw, pool.keys, HOUR)
    assert 100_000 <= records.number(raw.hget(pool.keys.state, "p0"), "ewma_us") <= 500_001
    assert isinstance(acquire(backend, pool, "@last"), Granted)


def test_timers_of_a_large_pool_are_all_corrected(backend: Backend, raw: Raw, pool: Pool) -> None:
    """Every lease's timer is corrected, although the pool has hundreds of other timers of leases and tombstones."""
    register(backend, pool, capacity=300, heartbeat=TTL_MS)
    for number in range(300):
        assert isinstance(acquire(backend, pool, f"@{number}", SHORT_MS * 100), Granted)
    for number in range(200):
        backend.run(commands.release(pool, f"@gone:{number}", tombstone_ms=120_000))
    set_back_pool(raw, pool.keys, HOUR)

    for _ in range(5):
        assert isinstance(acquire(backend, pool, "@refused"), Refused)
    far_ms = server_ms(raw) + 120_000
    due_ms = raw.zrange(pool.keys.due, 0, -1, withscores=True)
    assert [name for name, due in due_ms if name[0] == "@" and due > far_ms] == []
    assert raw.hget(pool.keys.state, "#clock").isdigit(), "the correction has ended"


@pytest.mark.parametrize("heartbeat_ms", [0, 300_000])
@pytest.mark.parametrize("ttl_ms", [TTL_MS, 300_000])
def test_refusal_reads_no_timer_records(
    own_server: Server, connect: Callable[..., Backend], ttl_ms: int, heartbeat_ms: int
) -> None:
    """A refused acquire uses HGET at most twice, even if many timers lie so far ahead that they may be wrong."""
    backend, calls = connect(own_server.url), 20
    pool = Pool.of(backend.namespace, "planner")
    register(backend, pool, capacity=150, heartbeat=heartbeat_ms)
    for number in range(150):
        acquire(backend, pool, f"@{number}", ttl_ms)
    with own_server.client() as raw:
        raw.config_resetstat()
        for _ in range(calls):
            assert isinstance(acquire(backend, pool, "@refused", ttl_ms), Refused)
        assert raw.info("commandstats")["cmdstat_hget"]["calls"] <= 2 * calls
