"""`agentperf status`: all three services on one page."""

from __future__ import annotations

from agentperf_redis import AgentInstance, AgentPerf
from tests.support.commandline import OK, Run, document, has_line, shown
from tests.support.servers import Server


def used(perf: AgentPerf) -> AgentInstance | None:
    """Use each service, and return an instance that holds a lease."""
    perf.metrics.record_execution("planner", 0.25, success=True)
    perf.metrics.record_execution("planner", 0.75, success=False, error_type="TimeoutError")
    cache = perf.cache("answers", max_size=7)
    cache.put("why?", "because")
    cache.get("why?")
    lb = perf.balancer()
    lb.register_instance(AgentInstance(id="p1", agent_type="planner", max_capacity=5))
    perf.metrics.flush()
    cache.flush()
    return lb.acquire("planner")


def test_status_shows_all_three_services(agentperf: Run, server: Server, perf: AgentPerf, namespace: str) -> None:
    held = used(perf)
    assert held is not None
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert "2 tasks of 1 agent in" in shown(done)
    for words in (("planner", "2", "50.0%", "TimeoutError × 1"), ("answers", "1", "7"), ("p1", "up", "1/5")):
        assert has_line(done.stdout, *words), done.stdout
    found = document(agentperf("status", "--json"), "status")
    assert found["agents"][0]["errors"] == {"TimeoutError": 1}
    assert found["caches"][0]["max_entries"] == 7
    assert found["pools"]["planner"]["current_load"] == 1
    assert perf.balancer().release(held)


def test_status_reports_an_empty_namespace(agentperf: Run, server: Server, namespace: str) -> None:
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert done.returncode == OK
    assert "Nothing here yet" in done.stdout


def test_names_with_brackets_are_printed_unchanged(
    agentperf: Run, server: Server, perf: AgentPerf, namespace: str
) -> None:
    odd = ("[/x]", "[red]", ":boom:")
    for name in odd:
        perf.metrics.record_execution(name, 0.1, success=False, error_type=name)
        perf.cache(name).put("a", 1)
        perf.balancer().register_instance(AgentInstance(id=name, agent_type=name))
    perf.metrics.flush()
    done = agentperf("status", "--url", server.url, "--namespace", namespace)
    assert (done.returncode, done.stderr) == (OK, "")
    for name in odd:
        assert done.stdout.count(name) == 7, done.stdout
