"""Tests of `agentperf doctor --plan`: it deletes its test keys, and its forecast is close to the real use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.cli import plan_costs
from agentperf_redis.cli.plan import Forecast, Plan, forecast
from agentperf_redis.metrics.retention import Retention
from tests.support.commandline import FAILURE, OK, USAGE, Run
from tests.support.schemas import SCHEMAS
from tests.support.servers import Server, wait_until

PLAN = "agents=1000,rps=50,entries=1e6,value=500,instances=5000,acquires=20"


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CALLS": 5, "LEAST_CALLS": 2, "IDLE_S": 0.0, "ENTRIES": 20, "INSTANCES": 10}.items():
        monkeypatch.setattr(plan_costs, name, value)


@pytest.mark.privileged
@pytest.mark.servers("valkey", "redis82", "redis70")
@pytest.mark.usefixtures("few_calls")
def test_plan_is_printed_and_leaves_no_keys(agentperf: Run, server: Server, namespace: str) -> None:
    done = agentperf("doctor", "--plan", PLAN)
    assert done.returncode == OK
    assert "It needs 1 node, 1 shard for the cache, 1 for the pool" in " ".join(done.stdout.split())
    for shown in ("metrics", "cache", "pool", "put that evicts", "Bytes of memory: entry "):
        assert shown in done.stdout
    document: dict[str, Any] = json.loads(agentperf("doctor", "--plan", PLAN, "--json").stdout)
    jsonschema.validate(document, SCHEMAS["doctor plan"])
    assert document["needs"]["cache"]["memory_bytes"] == pytest.approx(1e6 * document["costs"]["entry_bytes"], rel=1e-6)
    with server.client() as client:
        assert not list(client.scan_iter(f"{namespace}:doctor*"))


@pytest.mark.servers("valkey")
@pytest.mark.usefixtures("few_calls")
def test_plan_needs_rights_on_the_namespace_only(agentperf: Run, start_server: Callable[..., Server]) -> None:
    server = start_server("valkey")
    with server.client() as client:
        client.execute_command("ACL SETUSER me on >pw ~agentperf:* &agentperf:* +@all")
        url = f"redis://me:pw@127.0.0.1:{server.port}"
        assert agentperf("doctor", "--plan", PLAN, "--url", url, "--namespace", "agentperf").returncode == OK
        client.execute_command("ACL SETUSER me -@write")
        done = agentperf("doctor", "--plan", PLAN, "--url", url, "--namespace", "agentperf")
        assert done.returncode == FAILURE
        for said in ("the costs cannot be measured: ", "no permissions", "agentperf:doctor-", "+info +memory|usage"):
            assert said in done.stderr
        client.execute_command("ACL SETUSER me +@all -info")
        done = agentperf("doctor", "--plan", PLAN, "--url", url, "--namespace", "agentperf")
        assert (done.returncode, "info" in done.stderr) == (FAILURE, True)
        assert not list(client.scan_iter("*doctor*"))


@pytest.mark.servers("valkey")
@pytest.mark.usefixtures("few_calls")
def test_scratch_keys_that_stay_expire(agentperf: Run, start_server: Callable[..., Server]) -> None:
    server = start_server("valkey")
    with server.client() as client:
        client.execute_command("ACL SETUSER me on >pw ~* &* +@all -unlink -memory")
        url = f"redis://me:pw@127.0.0.1:{server.port}"
        assert agentperf("doctor", "--plan", PLAN, "--url", url).returncode == FAILURE
        left = list(client.scan_iter("*doctor-*"))
        assert left
        assert all(0 < client.pttl(key) <= plan_costs.KEPT_MS for key in left)


@pytest.mark.servers("valkey")
def test_faulty_plan_sends_nothing(agentperf: Run) -> None:
    done = agentperf("doctor", "--plan", "agents=many", "--url", "redis://127.0.0.1:1")
    assert done.returncode == USAGE
    assert "agents is 'many'; allowed: a whole number from 0 to 2000" in done.stderr


@pytest.mark.privileged
@pytest.mark.servers("cluster")
@pytest.mark.usefixtures("few_calls")
@pytest.mark.thorough
def test_plan_is_measured_on_a_cluster(agentperf: Run, server: Server) -> None:
    assert agentperf("doctor", "--plan", PLAN).returncode == OK
    for node in server.nodes:
        with node.client() as client:
            assert not list(client.scan_iter("*doctor-*"))


# -- the forecast, compared with the measured use of a server

AGENTS, EXECUTIONS, ENTRIES, READS, INSTANCES, LEASES, HELD = 50, 1000, 6000, 500, 200, 300, 100
"""Numbers of a small load. It has so many entries that the memory of connections hardly counts."""
ROUNDS = 3


class Use:
    """What a server used since the previous call of `taken`. The cost of reading these figures is subtracted."""

    def __init__(self, client: Any) -> None:
        self._client = client
        first, self._before = self._now(), self._now()
        self._own = tuple(after - before for after, before in zip(self._before, first, strict=True))

    def _now(self) -> tuple[float, ...]:
        facts = self._client.info("everything")
        cpu = facts["used_cpu_user_main_thread"] + facts["used_cpu_sys_main_thread"]
        return facts["used_memory"], cpu, facts["total_net_input_bytes"], facts["total_net_output_bytes"]

    def taken(self) -> tuple[float, ...]:
        """Return memory, server time, bytes received and bytes sent."""
        now = self._now()
        found = tuple(after - before - own for after, before, own in zip(now, self._before, self._own, strict=True))
        self._before = self._now()
        return found


@pytest.fixture
def measured(own_server: Server) -> Iterator[tuple[AgentPerf, Any]]:
    with AgentPerf(own_server.url) as perf, own_server.client() as client:
        yield perf, client


def near(found: tuple[float, ...], forecast_of: Forecast) -> bool:
    load = forecast_of.load
    expected = (load.cpu, load.received, load.sent)
    return all(0.5 < one / other < 2 for one, other in zip(found[1:], expected, strict=True))


@pytest.mark.privileged
@pytest.mark.thorough
@pytest.mark.servers("valkey", "redis82")
def test_forecast_is_within_a_factor_of_two(measured: tuple[AgentPerf, Any]) -> None:
    perf, client = measured
    lb, cache, metrics = perf.balancer(), perf.cache("answers", max_size=ENTRIES), perf.metrics
    lb.register_instance(AgentInstance("warm", "warm", max_capacity=1))
    with lb.lease("warm"):
        pass
    cache.put("warm", "up")
    metrics.record_execution("warm", 1.0, True)
    metrics.flush()
    costs = plan_costs.measured_costs(perf.backend, 500)

    freed = "the server to free the keys of the measurement, which it does in the background"
    wait_until(lambda: client.info("memory")["lazyfree_pending_objects"] == 0, freed)
    use = Use(client)
    for number in range(INSTANCES):
        lb.register_instance(AgentInstance(f"i{number}", "coder", max_capacity=10))
    held = [lb.acquire("coder", ttl=600) for _ in range(HELD)]
    for number in range(ENTRIES):
        cache.put(f"entry-{number:012d}", "v" * 500, ttl=600)
    plan = Plan(entries=ENTRIES, instances=INSTANCES, acquires=HELD, reads=0)
    memory = use.taken()[0]
    assert 0.5 < memory / forecast(plan, costs, 2**33, Retention()).memory < 2
    assert all(held)

    def leases() -> None:
        for _ in range(LEASES):
            with lb.lease("coder"):
                pass

    def reads() -> None:
        for number in range(READS):
            cache.get(f"entry-{number:012d}")

    def executions() -> None:
        for number in range(EXECUTIONS):
            metrics.record_execution(f"agent-{number % AGENTS}", 0.5 * 1.001**number, True)
        metrics.flush()

    for work, plan in (
        (leases, Plan(instances=INSTANCES, acquires=LEASES)),
        (reads, Plan(entries=ENTRIES, reads=READS, hits=1, processes=1)),
        (executions, Plan(agents=AGENTS, rps=EXECUTIONS, processes=1)),
    ):
        tried = []
        for _ in range(ROUNDS):  # a busy machine may disturb a round, or the measurement of the costs
            expected = forecast(plan, costs, 2**33, Retention())
            use.taken()
            work()
            tried.append((use.taken(), expected))
            if near(*tried[-1]):
                break
            costs = plan_costs.measured_costs(perf.backend, 500)
        else:
            pytest.fail(f"{work.__name__}: {tried}")
