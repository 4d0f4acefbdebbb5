from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from agentperf_redis.alerts.notify import body_of, retry_after, send, title_of
from agentperf_redis.alerts.rules import Address
from tests.support.alert_rules import Receiver

NOTICE = {
    "id": "0001-abc",
    "kind": "firing",
    "rule": "slow",
    "target": "planner",
    "severity": "page",
    "namespace": "shop",
    "at": 1_000_000_000.0,
    "reason": "p95 is 3 s",
}


def test_message_names_the_alert_and_ends_with_its_id() -> None:
    assert title_of(NOTICE) == "FIRING: slow, planner"
    assert title_of({**NOTICE, "kind": "resolved"}) == "RESOLVED: slow, planner"
    assert body_of(NOTICE).splitlines() == [
        "p95 is 3 s",
        "severity page, namespace shop, 2001-09-09 01:46:40 UTC",
        "id 0001-abc",
    ]


def test_retries_become_rarer() -> None:
    assert [retry_after(attempts) for attempts in (0, 1, 5, 10, 1000)] == [10.0, 20.0, 320.0, 900.0, 900.0]


def test_url_gets_the_message() -> None:
    with Receiver() as receiver:
        assert send(Address("ops/0", url=receiver.url), json.dumps(NOTICE)) == ""
        assert receiver.ids() == ["0001-abc"]
        assert receiver.posted[0]["type"] == "failure"


def test_failures_are_reported_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(lambda: 500) as receiver:
        error = send(Address("ops/0", url=receiver.url), json.dumps(NOTICE))
    assert error == "json://…: apprise could not deliver"
    assert (
        send(Address("ops/0", url="nosuch://hunter2"), json.dumps(NOTICE))
        == "nosuch://…: apprise knows no such address"
    )
    assert send(Address("ops/0", url="json://x"), "{") == "the stored notification is damaged"
    shown = caplog.text + error
    assert "hunter2" not in shown
    assert "tok3n" not in shown


def test_missing_apprise_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    assert "agentperf-redis[alerts]" in send(Address("ops/0", url="json://x"), json.dumps(NOTICE))


def test_command_gets_the_event_on_stdin(tmp_path: Path) -> None:
    place = tmp_path / "got"
    command = (sys.executable, "-c", f"import sys; open({str(place)!r}, 'w').write(sys.stdin.read())")
    assert send(Address("ops/command", command=command), json.dumps(NOTICE)) == ""
    assert json.loads(place.read_text()) == NOTICE


def test_failing_command_is_reported_without_its_arguments() -> None:
    code = "import sys; sys.exit(f'bad key {sys.argv[1]}')"
    error = send(Address("ops/command", command=(sys.executable, "-c", code, "hunter2")), json.dumps(NOTICE))
    assert "exit code 1: bad key …" in error
    assert "hunter2" not in error
    assert "No such file" in send(Address("ops/command", command=("/no/such/program",)), json.dumps(NOTICE))
