"""Tests of `agentperf export prometheus-rules`."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.support.commandline import FAILURE, OK, USAGE, Run, document, shown

RULES_KIND = "export prometheus-rules"
RULES = """
[[alert]]
name = "planner is slow"
agents = "planner*"
when = "p95 > 2s"

[[alert]]
name = "planner was slow once"
agents = "planner"
when = "max > 1m"
"""


def test_rules_are_written_and_the_others_named(agentperf: Run, tmp_path: Path) -> None:
    (tmp_path / "alerts.toml").write_text(RULES)
    done = agentperf("export", "prometheus-rules", str(tmp_path / "alerts.toml"))
    assert done.returncode == OK
    (group,) = yaml.safe_load(done.stdout)["groups"]
    assert [rule["alert"] for rule in group["rules"]] == ["planner is slow"]
    assert "left out 'planner was slow once': no exported metric has the figure max" in done.stderr
    target = tmp_path / "rules.yml"
    agentperf("export", "prometheus-rules", str(tmp_path / "alerts.toml"), "--output", str(target))
    assert target.read_text() == done.stdout
    found = document(agentperf("export", "prometheus-rules", str(tmp_path / "alerts.toml"), "--json"), RULES_KIND)
    assert (found["yaml"], [each["rule"] for each in found["left_out"]]) == (done.stdout, ["planner was slow once"])


def test_faulty_file_writes_nothing_and_names_every_fault(agentperf: Run, tmp_path: Path) -> None:
    (tmp_path / "alerts.toml").write_text(RULES.replace("2s", "2").replace("1m", "x"))
    done = agentperf("export", "prometheus-rules", str(tmp_path / "alerts.toml"), "--output", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr.count("alerts.toml, line") == 2
    assert not (tmp_path / "out").exists()


def test_missing_file_exits_1(agentperf: Run, tmp_path: Path) -> None:
    done = agentperf("export", "prometheus-rules", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert "cannot read" in done.stderr


def test_empty_file_makes_an_empty_rules_file(agentperf: Run, tmp_path: Path) -> None:
    (tmp_path / "alerts.toml").write_text("")
    assert yaml.safe_load(shown(agentperf("export", "prometheus-rules", str(tmp_path / "alerts.toml")))) == {
        "groups": []
    }
