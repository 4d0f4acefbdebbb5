from __future__ import annotations

import pytest

from agentperf_redis.alerts.expression import Scope
from agentperf_redis.alerts.rules import Rule, masked
from agentperf_redis.alerts.rules_file import read_rules, stored_rules
from agentperf_redis.errors import InvalidRules

EXAMPLE = """\
[[alert]]
name = "planner is slow"
agents = "planner*"              # or cache = "answers", pool = "coder", both globs
when = "p95 > 2s"
window = "5m"
for = "2m"
resolve = "p95 < 1.5s"
keep_firing_for = "5m"
min_events = 20
no_data = "keep"
severity = "page"
notify = ["ops"]
renotify = "4h"

[[alert]]
name = "few hits"
cache = "answers"
when = "hit_rate < 80%"
severity = "ticket"

[[alert]]
name = "queue"
pool = "coder"
when = "waiters > 10"
for = "30s"

[[slo]]
name = "planner succeeds"
agents = "planner"
objective = "99%"
window = "30d"
notify = ["ops"]

[notify.ops]
urls = ["slack://tokenA/tokenB", "json://user:secret@host/path"]
command = ["/usr/local/bin/page", "--key", "hidden"]
"""


def only(text: str) -> Rule:
    (rule,) = read_rules(text).rules
    return rule


def test_example_file_is_read() -> None:
    found = read_rules(EXAMPLE)
    slow, hits, queue, page, ticket = found.rules
    assert (slow.name, slow.scope, slow.pattern, slow.window, slow.every) == (
        "planner is slow",
        Scope.AGENTS,
        "planner*",
        300.0,
        60,
    )
    assert (slow.hold, slow.keep_firing, slow.renotify, slow.min_events) == (120.0, 300.0, 14_400.0, 20)
    assert slow.resolve is not None
    assert (hits.scope, hits.window, hits.min_events, hits.severity) == (Scope.CACHE, 300.0, 20, "ticket")
    assert (queue.scope, queue.every, queue.min_events) == (Scope.POOL, 10, 0)
    assert [burn.factor for burn in (*page.burns, *ticket.burns)] == pytest.approx([14.4, 6.0, 3.0, 1.0])
    assert page.windows == (300.0, 1800.0, 3600.0, 21_600.0)
    assert (page.name, page.severity) == ("planner succeeds (page)", "page")
    names = [address.name for address in found.addresses["ops"]]
    assert names == ["ops/0", "ops/1", "ops/command"]


def test_stored_fields_give_the_same_rules() -> None:
    found = read_rules(EXAMPLE)
    again = stored_rules({**found.stored, "version": "3", "deployed_ms": "5"})
    assert set(again.rules) == set(found.rules)
    assert again.addresses == found.addresses


@pytest.mark.parametrize("fields", [{"alert:x": "[]"}, {"alert:x": "{"}, {"odd:x": "{}"}, {"alert:x": "{}"}])
def test_damaged_stored_rule_is_a_value_error(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        stored_rules(fields)


def test_glob_matches_names() -> None:
    rule = only('[[alert]]\nname = "a"\nagents = "plan*"\nwhen = "tasks < 1"')
    assert [rule.matches(name) for name in ("planner", "plan*", "other")] == [True, True, False]
    bracketed = only('[[alert]]\nname = "a"\nagents = "a[1]"\nwhen = "tasks < 1"')
    assert bracketed.matches("a[1]")


def test_defaults_depend_on_the_measure() -> None:
    rate = only('[[alert]]\nname = "a"\nagents = "*"\nwhen = "failure_rate > 5%"')
    count = only('[[alert]]\nname = "a"\nagents = "*"\nwhen = "errors > 5"\nwindow = "1m"')
    assert (rate.min_events, rate.hold, rate.no_data, rate.severity, rate.every) == (20, 0.0, "keep", "page", 60)
    assert (count.min_events, count.zero_is_data, count.every) == (0, True, 10)


ALERT = '[[alert]]\nname = "a"\nagents = "x"\nwhen = "p95 > 2s"\n'
SLO = '[[slo]]\nname = "s"\nagents = "x"\n'


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[[alert]\nname = "a"', 1, "a valid TOML document"),
        ('x = 1\n[[alert]]\nname = "a"\nagents = "b"\nwhen = "tasks < 1"', 1, "[[alert]], [[slo]] and [notify.NAME]"),
        ('[[alert]]\nagents = "x"\nwhen = "p95 > 2s"', 1, "alert 1, name is None"),
        ('[[alert]]\nname = ""\nagents = "x"\nwhen = "p95 > 2s"', 2, "name is ''"),
        ('[[alert]]\nname = "a"\nwhen = "p95 > 2s"', 1, "exactly one of agents, cache and pool"),
        ('[[alert]]\nname = "a"\nagents = "x"\npool = "y"\nwhen = "p95 > 2s"', 3, "exactly one of"),
        ('[[alert]]\nname = "a"\nagents = 5\nwhen = "p95 > 2s"', 3, "agents is 5"),
        ('[[alert]]\nname = "a"\nagents = "x"\n\nwhen = "p95 > 2"', 5, "alert 'a', when is 'p95 > 2'"),
        (ALERT + 'resolve = "p95 > 1s"', 5, "resolve is 'p95 > 1s'"),
        (ALERT + 'window = "7s"', 5, "window is '7s'; allowed: '10s' to '90d'"),
        (ALERT + 'window = "330s"', 5, "from five minutes on one of 1m"),
        (ALERT + "window = 5", 5, "window is 5"),
        (ALERT + 'window = ["5m"]', 5, "window is ['5m']"),
        (ALERT + 'for = "soon"', 5, "for is 'soon'"),
        (ALERT + 'for = "40d"', 5, "at most '30d'"),
        (ALERT + 'renotify = "10s"', 5, "at least 1m"),
        (ALERT + "min_events = -1", 5, "min_events is -1"),
        (ALERT + "min_events = 1.5", 5, "min_events is 1.5"),
        (ALERT + 'no_data = "maybe"', 5, "one of 'keep', 'ok', 'alert'"),
        (ALERT + "no_data = []", 5, "no_data is []"),
        (ALERT + 'severity = ""', 5, "severity is ''"),
        (ALERT + 'notify = ["ops"]', 5, "it has no [notify.NAME]"),
        (ALERT + 'notify = "ops"', 5, "a list of at most 20 texts"),
        (ALERT + 'windw = "5m"', 5, "windw is 'windw'; allowed: the fields agents"),
        (ALERT + ALERT, 6, "a name that no other rule has"),
        (SLO + 'objective = "99%"\n[[alert]]\nname = "s (page)"\nagents = "x"\nwhen = "tasks < 1"', 2, "no other rule"),
        ('[[alert]]\nname = "a"\npool = "x"\nwhen = "waiters > 1"\nwindow = "5m"', 5, "no window"),
        (SLO, 1, "objective is None"),
        (SLO + 'objective = "fast"', 4, "'95% under 2s'"),
        (SLO + 'objective = "100%"', 4, "less than 100%"),
        (SLO + 'objective = "93%"', 4, "more than 93.0556%"),
        (SLO + 'objective = "50% under 2s"', 4, "more than 93.0556%"),
        (SLO + 'objective = "99% under 0s"', 4, "a duration from 1us to 24h"),
        (SLO + 'objective = "99%"\nwindow = "7d"', 5, "days from '28d' to '90d'"),
        (SLO + 'objective = "99%"\nfor = "5m"', 5, "for is 'for'"),
        ("[notify.ops]\nurls = []", 1, "urls, a command, or both"),
        ('[notify.ops]\nurls = ["nonsense"]', 2, "URLs such as mailto://"),
        ("[notify.ops]\ncommand = [5]", 2, "a list of at most 20 texts"),
        ('[notify.ops]\nurl = "json://x"', 2, "the fields command, urls"),
        ("alert = 5", 1, "tables [[alert]]"),
        ("notify = 5", 1, "tables [notify.NAME]"),
        ('[notify]\nops = "json://x"', 2, "a table"),
    ],
)
def test_fault_names_line_rule_field_and_what_is_allowed(text: str, line: int, words: str) -> None:
    with pytest.raises(InvalidRules) as refused:
        read_rules(text, "rules.toml")
    shown = str(refused.value)
    assert f"rules.toml, line {line}" in shown, shown
    assert words in shown, shown


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(InvalidRules) as refused:
        read_rules(ALERT + 'for = "x"\nno_data = "y"\n[[slo]]\nname = "s"\nagents = "x"\nobjective = "100%"')
    assert len(refused.value.faults) == 3
    assert str(refused.value).count("\n") == 2


def test_lines_are_right_beside_comments_and_long_texts() -> None:
    text = '# [[alert]]\n[[alert]]\nname = """\nwhen = 5\n"""\nagents = "x"\nwhen = "p95 > 2"'
    with pytest.raises(InvalidRules) as refused:
        read_rules(text)
    assert "line 7, alert" in str(refused.value)


def test_faults_do_not_show_secrets() -> None:
    text = '[notify.ops]\nurls = ["user:hunter2@host"]\n[notify.more]\nurls = "json://hunter2"\n[notify.x]\ncommand = "hunter2"'
    with pytest.raises(InvalidRules) as refused:
        read_rules(text)
    assert "hunter2" not in str(refused.value) + repr(refused.value.args)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("slack://tokenA/tokenB", "slack://…"),
        ("json://user:secret@host/path?x=1", "json://…"),
        ("secret", "…"),
        ("sec ret://x", "…"),
    ],
)
def test_masked_url_shows_only_its_scheme(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_masked_command_shows_only_its_program() -> None:
    addresses = read_rules(EXAMPLE).addresses["ops"]
    assert [address.masked for address in addresses] == ["slack://…", "json://…", "/usr/local/bin/page …"]


def test_too_many_rules_are_refused() -> None:
    text = "".join(f'[[alert]]\nname = "a{n}"\nagents = "x"\nwhen = "tasks < 1"\n' for n in range(501))
    with pytest.raises(InvalidRules, match="at most 500 rules"):
        read_rules(text)
    with pytest.raises(InvalidRules, match="at most 1000000 characters"):
        read_rules("#" * 1_000_001)
