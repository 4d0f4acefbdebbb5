"""Rules on a real server: alerts fire once, are resolved once, and do not flap."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.alerts.model import AlertState
from agentperf_redis.backend import Backend
from agentperf_redis.errors import InvalidArgument, InvalidRules
from agentperf_redis.script import Script
from tests.support.alert_rules import MINUTE, History, changes, evaluated
from tests.support.calls import Call
from tests.support.evaluators import Evaluators
from tests.support.proxy import Proxy
from tests.support.servers import Server, wait_until
from tests.support.workers import Workers

FAILING = """
[[alert]]
name = "failing"
agents = "planner*"
when = "failure_rate > 10%"
window = "5m"
for = "2m"
keep_firing_for = "3m"
"""
SLOW = """
[[alert]]
name = "slow"
agents = "planner*"
when = "p95 > 2s"
resolve = "p95 < 1.5s"
window = "5m"
for = "2m"
keep_firing_for = "3m"
"""
BURNING = """
[[slo]]
name = "succeeds"
agents = "planner"
objective = "99%"
"""
FIRST, BEGIN, END = 110, 80, 65
"""The beginning of the history, the beginning of the burst in it, and the end of the burst, in minutes before now."""


def load(url: str, namespace: str, seconds: float, failed: int) -> None:
    """Record a steady load of two agents. One agent also has a burst of failures or of slow executions."""
    backend = Backend(url, namespace=namespace)
    history = History(backend)
    for at in history.minutes(FIRST, 1):
        bursts = END * MINUTE <= history.now - at <= BEGIN * MINUTE
        history.record("helper", at - 30, 0.5)
        history.record("planner", at - 30, seconds if bursts else 0.5, failed=failed if bursts else 0, succeeded=6)
    history.count()
    backend.close()


CASES = {
    "failures": (FAILING, 0.5, 3, "failing", 2),
    "p95": (SLOW, 3.0, 0, "slow", 2),
    "burn rate": (BURNING, 0.5, 3, "succeeds (page)", 0),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_burst_fires_and_is_resolved_once(
    perf: AgentPerf,
    backend: Backend,
    server: Server,
    namespace: str,
    workers: Workers,
    evaluators: Evaluators,
    case: str,
) -> None:
    """Four processes record and three others evaluate. One evaluator is killed between a claim and its report."""
    rules, seconds, failed, name, wait = CASES[case]
    workers.run(load, [(server.url, namespace, seconds, failed)] * 4)
    perf.alerts.deploy(text=rules)
    history = History(backend)
    events = [event for event in evaluators.evaluate(history.minutes(FIRST - 8, 1)) if event.rule == name]
    assert evaluators.killed == 1
    assert {event.target for event in events} == {"planner"}
    states = [event.after for event in events]
    assert states == [AlertState.PENDING, AlertState.FIRING, AlertState.OK][0 if wait else 1 :]
    fired, resolved = events[-2], events[-1]
    if wait:
        assert fired.at - events[0].at == wait * MINUTE
        begin = (history.now - events[0].at) / MINUTE
        assert BEGIN - 2 <= begin <= BEGIN, "the burst is noticed within two minutes"
    assert resolved.at > history.now - END * MINUTE, "it ends after the burst"
    assert fired.value is not None
    assert fired.interval.end == fired.at
    assert list(perf.alerts.log(name)) == events


def test_one_evaluator_sees_the_burst(perf: AgentPerf, backend: Backend, server: Server, namespace: str) -> None:
    load(server.url, namespace, 0.5, 3)
    perf.alerts.deploy(text=FAILING)
    events = evaluated(perf, History(backend).minutes(BEGIN + 4, END - 12))
    assert changes(events) == [("planner", "pending"), ("planner", "firing"), ("planner", "ok")]


@pytest.mark.thorough
def test_hit_rate_of_a_cache_fires_and_is_resolved_once(perf: AgentPerf, evaluators: Evaluators) -> None:
    perf.alerts.deploy(
        text='[[alert]]\nname = "misses"\ncache = "ans*"\nwhen = "hit_rate < 80%"\nwindow = "5m"\nfor = "2m"'
    )
    cache = perf.cache("answers", max_size=10)
    cache.put("known", 1)
    events = []
    for number in range(40):
        for _ in range(10):
            cache.get("unknown" if 10 <= number < 20 else "known")
        cache.flush()
        events += evaluators.evaluate([1_000_000 * MINUTE + number * MINUTE])
    assert changes(events) == [("answers", "pending"), ("answers", "firing"), ("answers", "ok")]
    assert evaluators.killed == 1


@pytest.mark.thorough
def test_waiters_of_a_pool_fire_and_are_resolved_once(perf: AgentPerf, evaluators: Evaluators) -> None:
    perf.alerts.deploy(text='[[alert]]\nname = "queue"\npool = "coder"\nwhen = "waiters > 2"\nfor = "30s"')
    lb = perf.balancer()
    lb.register_instance(AgentInstance("c1", "coder", max_capacity=1))
    held = lb.acquire("coder")
    assert held is not None
    start = 1_000_000.0
    events = evaluators.evaluate(start + 10 * number for number in range(5))
    waiters = [threading.Thread(target=lambda: lb.acquire("coder", wait=60)) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    wait_until(lambda: lb.status("coder")[0].waiting == 3, "three waiters")
    events += evaluators.evaluate(start + 10 * number for number in range(5, 12))
    lb.update_instance("coder", "c1", max_capacity=4)
    for waiter in waiters:
        waiter.join()
    events += evaluators.evaluate(start + 10 * number for number in range(12, 18))
    assert changes(events) == [("coder", "pending"), ("coder", "firing"), ("coder", "ok")]
    # Usually, the alert fires 30 s after it became pending. If an evaluator is killed during the evaluation at that
    # time, the alert fires at the next evaluation, which is 10 s later.
    assert events[1].at - events[0].at in (30.0, 40.0)
    assert evaluators.killed == 1


def test_values_within_the_error_bound_change_no_state(perf: AgentPerf, backend: Backend) -> None:
    """For an hour, the exact p95 is alternately above and below the threshold, by less than the error bound."""
    history = History(backend)
    for number, at in enumerate(history.minutes(70, 1)):
        for _ in range(3):
            history.record("planner", at - 30, 2.01 if number % 2 else 2.07, succeeded=10)
    history.count()
    text = '[[alert]]\nname = "{}"\nagents = "planner"\nwhen = "p95 {} 2.04s"\nwindow = "1m"\n'
    perf.alerts.deploy(text=text.format("above", ">") + text.format("below", "<="))
    assert evaluated(perf, history.minutes(64, 1)) == []
    assert {each.state for each in perf.alerts.list().alerts} == {AlertState.OK}


def test_api_deploys_evaluates_and_shows(perf: AgentPerf, backend: Backend, call: Call) -> None:
    history = History(backend)
    history.record("planner", history.now - 90, 0.5, failed=30)
    history.count()
    text = (
        FAILING.replace('"2m"', '"0s"') + 'severity = "ticket"\nnotify = ["ops"]\n[notify.ops]\ncommand = ["/bin/true"]'
    )
    done = call(perf.alerts, "deploy", text=text)
    assert (done.number, done.rules, done.receivers, done.removed) == (1, ("failing",), ("ops",), 0)
    found = call(perf.alerts, "evaluate", as_of=history.now)
    assert (found.rules, changes(found.events)) == (("failing",), [("planner", "firing")])
    assert call(perf.alerts, "evaluate", as_of=history.now).rules == (), "each evaluation is done once"
    overview = call(perf.alerts, "list")
    (alert,) = overview.alerts
    assert (alert.state, alert.value, alert.severity) == (AlertState.FIRING, pytest.approx(30 / 31), "ticket")
    (rule,) = overview.rules
    assert (rule.name, rule.targets, rule.judged_at, rule.silenced_until) == ("failing", 1, history.now, None)
    (receiver,) = overview.receivers
    assert (receiver.name, receiver.waiting, receiver.error) == ("ops/command", 1, None)
    until = call(perf.alerts, "silence", "fail*", "2h", as_of=history.now)
    assert until == history.now + 7200
    overview = call(perf.alerts, "list")
    assert (overview.alerts[0].state, overview.rules[0].silenced_until) == (AlertState.SILENCED, until)
    call(perf.alerts, "unsilence", "failing")
    assert call(perf.alerts, "list").alerts[0].state is AlertState.FIRING
    assert [event.after.value for event in call(perf.alerts, "log", limit=2)] == ["silenced", "ok"]
    with pytest.raises(InvalidArgument, match="a deployed rule, or a glob: 'failing'"):
        call(perf.alerts, "silence", "nonsense", "2h")
    with pytest.raises(InvalidRules):
        call(perf.alerts, "deploy", text=text.replace("failure_rate", "nonsense"))
    assert call(perf.alerts, "list").deployment == 1, "a file with a fault deploys nothing"
    assert call(perf.alerts, "deploy", text="").removed == 1
    assert call(perf.alerts, "list").alerts == ()


def test_deployment_keeps_states_and_drops_those_of_other_targets(perf: AgentPerf, backend: Backend) -> None:
    history = History(backend)
    for agent in ("planner", "planner2"):
        history.record(agent, history.now - 90, 0.5, failed=30)
    history.count()
    text = FAILING.replace('"2m"', '"0s"')
    perf.alerts.deploy(text=text)
    assert len(evaluated(perf, [history.now])) == 2
    perf.alerts.deploy(text=text.replace("10%", "20%").replace("planner*", "planner"))
    events = evaluated(perf, [history.now])
    assert changes(events) == [("planner2", "ok")]
    assert events[0].reason == "the rule no longer watches it"
    assert [each.target for each in perf.alerts.list().alerts] == ["planner"]


def test_gone_target_is_forgotten_after_a_day(perf: AgentPerf) -> None:
    perf.alerts.deploy(text='[[alert]]\nname = "load"\npool = "*"\nwhen = "healthy >= 1"')
    lb = perf.balancer()
    lb.register_instance(AgentInstance("c1", "coder"))
    start = 1_000_000.0
    assert changes(evaluated(perf, [start])) == [("coder", "firing")]
    lb.remove_instance("coder", "c1")
    assert evaluated(perf, [start + 10, start + 80_000]) == [], "a firing alert does not end by silence"
    events = evaluated(perf, [start + 90_000])
    assert (changes(events), events[0].reason) == ([("coder", "ok")], "it is gone")
    assert perf.alerts.list().alerts == ()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"path": "x", "text": "y"},
        {"text": 5},
        {"path": "/no/such/file"},
        {"path": "\0"},
        {"path": "x" * 70_000},
        {"path": 5},
    ],
)
def test_deploy_needs_a_file_or_a_text(perf: AgentPerf, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        perf.alerts.deploy(**arguments)
    assert len(str(caught.value)) < 400


def test_faults_of_a_rules_file_are_reported_as_such(perf: AgentPerf, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text("[[alert]]\nname = 5\n")
    with pytest.raises(InvalidRules) as caught:
        perf.alerts.deploy(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("evaluate", {"as_of": "yesterday"}),
        ("silence", {"rule": "", "seconds": 5}),
        ("silence", {"rule": "x", "seconds": "long"}),
        ("unsilence", {"rule": 5}),
        ("log", {"limit": 0}),
        ("log", {"rule": ""}),
        ("test", {"text": "", "since": "1s"}),
        ("test", {"text": "", "since": "40d"}),
        ("test", {"text": "", "as_of": "now"}),
    ],
)
def test_invalid_arguments_are_refused(perf: AgentPerf, call: Call, method: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        call(perf.alerts, method, **arguments)


@pytest.mark.parametrize("script", ["claim", "report"])
def test_lost_reply_delays_no_evaluation(
    server: Server, namespace: str, proxy: Proxy, perf: AgentPerf, script: str
) -> None:
    """A repeated claim gets the same rules as the first. A repeated report returns that the first report is stored."""
    load(server.url, namespace, 0.5, 3)
    perf.alerts.deploy(text=FAILING)
    at = History(perf.backend).now - (BEGIN - 4) * MINUTE
    perf.alerts.evaluate(as_of=at - 20 * MINUTE)  # loads the scripts, so that the lost reply is not NOSCRIPT
    with AgentPerf(proxy.url, namespace=namespace) as other:
        lost = proxy.reset_after_reply(only=Script(f"alerts/{script}"))
        done = other.alerts.evaluate(as_of=at)
        assert lost.caught.is_set()
        assert (done.rules, changes(done.events)) == (("failing",), [("planner", "pending")])
        assert other.alerts.evaluate(as_of=at).rules == (), "the rule was evaluated once"
    assert list(perf.alerts.log()) == list(done.events)
