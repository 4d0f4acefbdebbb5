"""Rules for Prometheus: each expression is PromQL over exported metrics, and means the same as the rule."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from agentperf_redis.alerts.expression import MEASURES, Scope
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.export.families import values
from agentperf_redis.export.prometheus_rules import regex_of, rules_file
from agentperf_redis.export.text import Form, text
from tests.support import exposition
from tests.support.readings import reading

HEAD = {Scope.AGENTS: "agents", Scope.CACHE: "cache", Scope.POOL: "pool"}
THRESHOLDS = {"seconds": "2s", "share": "50%", "count": "20", "bytes": "5MB", "per second": "3/s"}


def rule(scope: str, when: str, **more: object) -> str:
    fields = "".join(f"{name} = {value!r}\n" for name, value in more.items())
    return f"[[alert]]\nname = {f'{scope} {when}'!r}\n{scope} = 'planner*'\nwhen = {when!r}\n{fields}"


def every_rule() -> str:
    """Return a rules file with each measure, an SLO of each kind, and globs."""
    parts = [
        rule(HEAD[measure.scope], f"{name} > {THRESHOLDS[measure.unit.value]}") for name, measure in MEASURES.items()
    ]
    parts += [rule("agents", f"{name} >= 250ms", min_events=7, no_data="alert") for name in ("p50", "p95", "p99.9")]
    parts += [rule("pool", "load >= 90%"), rule("cache", "hit_rate < 80%", resolve="hit_rate > 90%")]
    parts += [f"[[slo]]\nname = {each!r}\nagents = 'a.b'\nobjective = {each!r}\n" for each in ("99%", "95% under 2s")]
    return "\n".join(parts)


def written(rules: str) -> dict[str, dict[str, Any]]:
    """Return the rules of the file by name."""
    made, left_out = rules_file(read_rules(rules))
    assert {each.rule for each in left_out} <= {"agents max > 2s"}
    return {each["alert"]: each for group in yaml.safe_load(made)["groups"] for each in group["rules"]}


def selectors(promql: Any, query: str) -> Iterator[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    assert promql.walk(promql.parse(query), visit, None)
    yield from found


@pytest.mark.thorough  # needs promql_parser, which is in the extra `borders`
def test_every_expression_is_promql_over_exported_metrics() -> None:
    promql = pytest.importorskip("promql_parser")
    page = exposition.plain(text(values(reading("a")), Form.PLAIN))
    labels: dict[str, set[str]] = {}
    for name, own in page.values:
        labels.setdefault(name, set()).update(label for label, _ in own)
    found = written(every_rule())
    # Each measure but `max` has one rule. `every_rule` adds 5 more alerts, and 2 SLOs with 2 rules each.
    assert len(found) == len(MEASURES) - 1 + 5 + 4
    for name, each in found.items():
        used = list(selectors(promql, each["expr"]))
        assert used, name
        for selector in used:
            if selector.name == "ALERTS":  # a metric of Prometheus itself
                continue
            assert selector.name in labels, f"{name}: {selector.name} is not exported"
            assert {matcher.name for matcher in selector.matchers.matchers} <= labels[selector.name], name


def test_fields_of_a_rule_are_kept() -> None:
    (found,) = written(
        "[[alert]]\nname = 'slow: \"a\"'\nagents = 'planner'\nwhen = 'p95 > 2s'\nwindow = '10m'\nfor = '90s'\n"
        "keep_firing_for = '5m'\nmin_events = 20\nseverity = 'page'\n"
    ).values()
    assert found["alert"] == 'slow: "a"'
    assert (found["for"], found["keep_firing_for"], found["labels"]) == ("90s", "5m", {"severity": "page"})
    assert found["expr"] == (
        "(histogram_quantile(0.95, sum by (agent, le) "
        '(rate(agentperf_agent_execution_seconds_bucket{agent="planner"}[10m]))) > 2) '
        'and on (agent) sum by (agent) (increase(agentperf_agent_executions_total{agent="planner"}[10m])) >= 20'
    )
    assert found["annotations"]["summary"] == "{{ $labels.agent }}: p95 > 2s"


def test_resolve_keeps_a_firing_alert_until_the_second_threshold() -> None:
    (found,) = written(rule("agents", "throughput > 2/s", resolve="throughput < 1/s", min_events=0)).values()
    rate = 'sum by (agent) (rate(agentperf_agent_executions_total{agent=~"planner.*"}[5m]))'
    firing = 'ALERTS{alertname="agents throughput > 2/s",alertstate="firing"}'
    assert found["expr"] == f"{rate} > 2 or ({rate} >= 1 and on (agent) {firing})"


def test_burn_rate_has_both_windows_of_each_pair() -> None:
    found = written("[[slo]]\nname = 's'\nagents = 'planner'\nobjective = '99%'\nmin_events = 0\n")
    page = found["s (page)"]["expr"]
    assert [float(each) for each in re.findall(r"> ([\d.]+)", page)] == pytest.approx([0.144, 0.144, 0.06, 0.06])
    assert re.findall(r"failure\"}\[(\w+)]", page) == ["1h", "5m", "6h", "30m"]
    assert page.count(" or ") == 1


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (rule("agents", "max > 2s"), "no exported metric"),
        (rule("agents", "p95 > 2s", window="30s"), "shorter than 1m"),
        ("[[slo]]\nname = 's'\nagents = 'a'\nobjective = '95% under 3s'\n", "no bound of a classic bucket"),
    ],
)
def test_inexpressible_rule_is_left_out_with_a_reason(rules: str, reason: str) -> None:
    made, left_out = rules_file(read_rules(rules))
    assert yaml.safe_load(made) == {"groups": []}
    assert left_out
    assert [each for each in left_out if reason not in each.reason] == []


NAMES = (
    "planner",
    "planner-2",
    "a.b",
    "axb",
    "a+b",
    "[x]",
    "",
    "pla]er",
    "a\\b",
    "p^",
    "é*",
    "Planner",
    "a|b",
    "x",
    "y",
    "!",
)


@pytest.mark.parametrize(
    "glob",
    ["*", "planner*", "?", "a.b", "a+b", "[xy]", "[!x]", "[[]x]", "*[!0-9]", "a?b", "[", "a\\b", "é*", "[^x]", "a|b"],
)
def test_glob_matches_the_same_names_as_its_expression(glob: str) -> None:
    found = regex_of(glob)
    assert [name for name in NAMES if re.fullmatch(found, name)] == [
        name for name in NAMES if fnmatch.fnmatchcase(name, glob)
    ]
