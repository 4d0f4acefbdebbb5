"""`agentperf lb rest` and `agentperf lb delete-pool` on pools that programs use."""

from __future__ import annotations

from functools import partial

import pytest

from agentperf_redis import AgentInstance, AgentPerf, LeaseLost
from tests.support.commandline import NOT_FOUND, OK, USAGE, Run, document, has_line, shown
from tests.support.servers import Raw


@pytest.fixture
def lb(agentperf: Run, perf: AgentPerf) -> Run:
    """Run `agentperf lb` on the test's namespace. The pool "planner" has the instances p0 and p1."""
    for name in ("p0", "p1"):
        perf.balancer().register_instance(AgentInstance(name, "planner", max_capacity=2))
    return partial(agentperf, "lb")


def test_resting_instance_takes_no_work_until_shown_time(lb: Run, perf: AgentPerf) -> None:
    text = shown(lb("rest", "planner", "p0", "--for", "2h"))
    assert text.startswith("p0 of planner takes no new work until ")
    assert text.endswith(", 7200 s.\n")
    taken = [perf.balancer().acquire("planner") for _ in range(3)]
    assert [each and each.id for each in taken] == ["p1", "p1", None]
    # A shorter rest does not end a longer one.
    found = document(lb("rest", "planner", "p0", "--for", "1", "--json"), "lb rest")
    assert (found["pool"], found["instance"]) == ("planner", "p0")
    assert 7000 < found["resting_s"] <= 7200
    assert has_line(shown(lb("status")), "p0", "resting: rate-limited by its service")
    lb("mark-healthy", "planner", "p0")
    taken.append(perf.balancer().acquire("planner"))
    assert [each and each.id for each in taken[3:]] == ["p0"]
    for each in taken:
        perf.balancer().release(each)


@pytest.mark.parametrize("length", ["0", "-1", "2d", "soon", "nan", "1s2", ""])
def test_wrong_length_of_a_rest_exits_2(lb: Run, perf: AgentPerf, length: str) -> None:
    done = lb("rest", "planner", "p0", f"--for={length}")
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert f"--for is {length!r}; allowed: seconds from 0.001 to 86400" in done.stderr
    assert {each.state.value for each in perf.balancer().status("planner")[0].instances} == {"up"}


def test_delete_pool_needs_confirmation_and_ends_leases(lb: Run, perf: AgentPerf, raw: Raw, namespace: str) -> None:
    balancer = perf.balancer()
    held = balancer.acquire("planner")
    assert held is not None
    assert held.lease is not None
    unconfirmed = lb("delete-pool", "planner")
    assert (unconfirmed.returncode, unconfirmed.stdout) == (USAGE, "")
    assert "Delete pool planner with 2 instances and 1 lease?" in unconfirmed.stderr
    assert "--yes" in unconfirmed.stderr
    assert len(balancer.instances["planner"]) == 2

    done = lb("delete-pool", "planner", "--yes")
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout == "Deleted pool planner with 2 instances and 1 lease.\n"
    assert all(raw.ttl(key) >= 0 for key in raw.scan_iter(f"{namespace}:{{lb:planner}}*"))
    with pytest.raises(LeaseLost):
        held.lease.extend(5)
    assert "planner" not in balancer.instances
    again = lb("delete-pool", "planner", "--yes")
    assert (again.returncode, again.stdout) == (NOT_FOUND, "")


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("rest", "unknown", "p0", "--for", "9"), "pool 'unknown'"),
        (("rest", "planner", "p9", "--for", "9"), "instance 'p9' in pool 'planner'"),
        (("delete-pool", "unknown", "--yes"), "pool 'unknown'"),
    ],
)
def test_missing_objects_exit_4(lb: Run, perf: AgentPerf, words: tuple[str, ...], missing: str) -> None:
    done = lb(*words)
    assert (done.returncode, done.stdout) == (NOT_FOUND, "")
    assert done.stderr == f"agentperf: not found: {missing}\n"
    assert len(perf.balancer().instances["planner"]) == 2
