"""`agentperf up`, `status` and `down` run as separate programs on one server. Only `up` starts a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commandline import OK, UNREACHABLE, Program


@pytest.mark.thorough
def test_up_status_and_down_share_a_server(program: Program) -> None:
    try:
        up = program("up", "--json")
        assert up.returncode == OK, up.stderr
        first = json.loads(up.stdout)
        assert first["was_running"] is False
        assert Path(first["url"].removeprefix("unix://")).stat().st_mode & 0o077 == 0
        status = program("status")
        assert status.returncode == OK
        assert first["url"] in status.stdout
    finally:
        down = program("down", "--json")
    assert json.loads(down.stdout)["stopped"] is True


@pytest.mark.thorough
def test_running_server_is_named_again(program: Program) -> None:
    try:
        first = json.loads(program("up", "--json").stdout)
        again = json.loads(program("up", "--json").stdout)
        assert (again["pid"], again["was_running"]) == (first["pid"], True)
        text = program("up")
        assert text.stdout == first["url"] + "\n"
        assert f"redis-cli -s {first['url'].removeprefix('unix://')}" in text.stderr
        assert f"export AGENTPERF_REDIS_URL={first['url']}" in text.stderr
        by_scheme = program("status", AGENTPERF_REDIS_URL="embedded://")
        assert (by_scheme.returncode, by_scheme.stderr) == (OK, "")
    finally:
        assert json.loads(program("down", "--json").stdout)["stopped"] is True
    assert json.loads(program("down", "--json").stdout)["stopped"] is False


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["status", "doctor"])
def test_read_commands_start_no_server(program: Program, tmp_path: Path, command: str) -> None:
    for url, up in (
        ("embedded://", "`agentperf up`"),
        (f"embedded://{tmp_path}/a", f"`agentperf up --data {tmp_path}/a`"),
    ):
        done = program(command, AGENTPERF_REDIS_URL=url)
        folder = ("--data", str(tmp_path / "a")) if url.endswith("a") else ()
        assert json.loads(program("down", "--json", *folder).stdout)["stopped"] is False
        assert (done.returncode, done.stdout) == (UNREACHABLE, "")
        assert f"{url}: " in done.stderr
        assert up in done.stderr


def test_unreachable_server_exits_3_with_advice(program: Program) -> None:
    done = program("status", "--url", "redis://me:hunter2@127.0.0.1:1/0", "--timeout", "0.2")
    assert done.returncode == UNREACHABLE
    assert done.stdout == ""
    assert "agentperf up" in done.stderr
    assert "hunter2" not in done.stderr
