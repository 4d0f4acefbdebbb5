"""Checks of docker-compose.yml that need no Docker."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.cli.app import app
from agentperf_redis.export.prometheus_rules import rules_file
from tests.support.places import ROOT

_COMPOSE = (ROOT / "docker-compose.yml").read_text()
_SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(_COMPOSE)["services"]
_CONFIGS: dict[str, dict[str, str]] = yaml.safe_load(_COMPOSE)["configs"]


def _dockerfile() -> list[list[str]]:
    """Return the instructions of the inline Dockerfile, each as a list of words."""
    found = re.search(r"dockerfile_inline: \|\n((?: {6}.*\n)+)", _COMPOSE)
    assert found
    return [shlex.split(line) for line in textwrap.dedent(found[1]).splitlines()]


@pytest.mark.thorough
def test_image_copies_everything_its_wheel_needs(tmp_path: Path) -> None:
    context = tmp_path / "app"
    context.mkdir()
    for _, *sources, target in (words for words in _dockerfile() if words[0] == "COPY"):
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, context / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, context / target)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(context)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("agentperf_redis-*.whl"))


def test_build_context_contains_only_copied_files() -> None:
    everything, *kept = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [source for words in _dockerfile() if words[0] == "COPY" for source in words[1:-1]]
    assert everything == "*"
    assert sorted(line for line in kept if line.startswith("!")) == sorted(f"!{source}" for source in copied)
    assert [line for line in kept if not line.startswith("!")] == ["**/__pycache__"]


def test_image_runs_the_command_with_its_extras() -> None:
    words = _dockerfile()
    assert words[0] == ["FROM", "python:3.11-slim"]
    assert ["RUN", "pip", "install", "--no-cache-dir", ".[cli,prometheus,grafana]"] in words
    assert words[-1] == ["ENTRYPOINT", "[agentperf]"]
    assert words[-2][0] == "USER"
    assert 'command: [demo, --url, "redis://redis:6379/0"]' in _COMPOSE


def test_server_persists_data_and_never_evicts() -> None:
    command = re.search(r"command:\n((?: {6}- .*\n)+)", _COMPOSE)
    assert command
    words = [line.partition("- ")[2].partition(" #")[0].strip('"') for line in command[1].splitlines()]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "valkey-server"
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert "- data:/data" in _COMPOSE
    assert '"127.0.0.1:6379:6379"' in _COMPOSE


def own_services() -> list[str]:
    return [name for name, service in _SERVICES.items() if str(service["image"]).startswith("agentperf-redis")]


@pytest.mark.parametrize("name", own_services())
def test_command_of_each_service_exists(name: str) -> None:
    """Parse the command as the program would, without running it."""
    command: Any = typer.main.get_command(app)
    words = list(_SERVICES[name]["command"])
    context = command.make_context("agentperf", list(words))
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
        nested = hasattr(command, "commands")
        context = command.make_context("agentperf", words[:1] if nested else list(words), parent=context)


def test_profiles_start_what_they_need() -> None:
    started = {
        profile: {name for name, service in _SERVICES.items() if profile in service.get("profiles", [profile])}
        for profile in ("demo", "ops", "monitoring")
    }
    assert started["demo"] == {"redis", "worker"}
    assert started["ops"] == {"redis", "exporter"}
    files = {"dashboard-file", "rules-file"}
    assert started["monitoring"] == {"redis", "exporter", "prometheus", "grafana"} | files
    for names in started.values():
        for name in names:
            assert set(_SERVICES[name].get("depends_on") or ()) <= names


def test_ports_are_open_to_this_machine_only() -> None:
    ports = {name: service.get("ports", []) for name, service in _SERVICES.items()}
    assert {name for name, each in ports.items() if each} == {"redis", "exporter", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for each in ports.values() for port in each)


def test_every_config_and_volume_is_declared_and_used() -> None:
    used = {each["source"] for service in _SERVICES.values() for each in service.get("configs", ())}
    assert used == set(_CONFIGS)
    mounted = {each.partition(":")[0] for service in _SERVICES.values() for each in service.get("volumes", ())}
    assert mounted == set(yaml.safe_load(_COMPOSE)["volumes"])


def test_monitoring_finds_the_exporter_and_the_dashboard() -> None:
    scraped = yaml.safe_load(_CONFIGS["prometheus"]["content"])["scrape_configs"]
    words = _SERVICES["exporter"]["command"]
    (target,) = (target for each in scraped for static in each["static_configs"] for target in static["targets"])
    assert target == f"exporter:{words[words.index('--port') + 1]}"
    (source,) = yaml.safe_load(_CONFIGS["grafana-datasources"]["content"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(_CONFIGS["grafana-dashboards"]["content"])["providers"]
    assert f"generated:{provider['options']['path']}:ro" in _SERVICES["grafana"]["volumes"]
    writes = _SERVICES["dashboard-file"]
    assert (writes["command"][-1], writes["volumes"]) == ("/export/agentperf.json", ["generated:/export"])
    home = _SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/agentperf.json"
    assert any(words[0] == "RUN" and "/export" in words for words in _dockerfile()), "the volume gets its owner"


def test_prometheus_gets_the_generated_rules() -> None:
    service = _SERVICES["rules-file"]
    (mounted,) = service["configs"]
    assert service["command"] == ["export", "prometheus-rules", mounted["target"], "--output", "/export/rules.yml"]
    made, left_out = rules_file(read_rules(_CONFIGS[mounted["source"]]["content"]))
    assert yaml.safe_load(made)["groups"]
    assert left_out == ()
    assert yaml.safe_load(_CONFIGS["prometheus"]["content"])["rule_files"] == ["/generated/rules.yml"]
    assert "generated:/generated:ro" in _SERVICES["prometheus"]["volumes"]
