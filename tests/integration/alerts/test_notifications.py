"""A notification is delivered at least once. Its copies have one id. A failing receiver delays no other receiver."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.alerts import commands, notify
from agentperf_redis.alerts.model import ReceiverStatus
from agentperf_redis.alerts.notify import Deliveries, deliver_all
from agentperf_redis.backend import Backend
from agentperf_redis.errors import BackendUnavailable
from tests.support.alert_rules import MINUTE, History, Receiver, evaluated
from tests.support.servers import Raw, wait_until

LIMIT_S = 60.0
FAILING = """
[[alert]]
name = "failing"
agents = "planner"
when = "errors > 3"
window = "5m"
notify = ["ops"]
renotify = "10m"
"""


def rules(*urls: str, command: tuple[str, ...] = ()) -> str:
    return FAILING + f"[notify.ops]\nurls = {json.dumps(urls)}\ncommand = {json.dumps(command)}\n"


@pytest.fixture
def history(backend: Backend) -> History:
    """Forty minutes with one success each. From 35 to 15 minutes ago, each minute also has four failures."""
    history = History(backend)
    for at in history.minutes(40, 1):
        history.record("planner", at - 30, 0.5, failed=4 if 15 <= (history.now - at) / MINUTE <= 35 else 0)
    history.count()
    return history


def all_receivers(perf: AgentPerf) -> dict[str, ReceiverStatus]:
    return {each.name: each for each in perf.alerts.list().receivers}


def test_receiver_gets_each_notification_once(perf: AgentPerf, history: History) -> None:
    with Receiver() as receiver:
        perf.alerts.deploy(text=rules(receiver.url))
        events = evaluated(perf, history.minutes(38, 1))
        assert deliver_all(perf.alerts._service, LIMIT_S) == 4
        titles = [title.partition(":")[0] for title in receiver.titles()]
        assert titles == ["FIRING", "STILL FIRING", "STILL FIRING", "RESOLVED"]
        ids = receiver.ids()
        assert (ids[0], ids[-1]) == (events[0].id, events[1].id)
        assert len(set(ids)) == 4
        assert deliver_all(perf.alerts._service, LIMIT_S) == 0
    (of,) = all_receivers(perf).values()
    assert (of.waiting, of.attempts, of.error, of.failed_at, of.dropped) == (0, 0, None, None, 0)


def test_silenced_rule_sends_nothing(perf: AgentPerf, history: History) -> None:
    perf.alerts.deploy(text=rules(command=("/bin/false",)))
    perf.alerts.silence("failing", "2h", as_of=history.now - 40 * MINUTE)
    assert len(evaluated(perf, history.minutes(38, 1))) == 2
    assert deliver_all(perf.alerts._service, LIMIT_S) == 0


def test_copy_after_a_crash_carries_the_same_id(
    perf: AgentPerf, history: History, raw: Raw, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process delivers a notification and ends before it records the delivery. Another process delivers a copy."""
    with Receiver() as receiver:
        perf.alerts.deploy(text=rules(receiver.url))
        evaluated(perf, history.minutes(38, 30))
        with monkeypatch.context() as patch:

            def crash(*_: object, **__: object) -> Any:
                raise BackendUnavailable("here", "unknown", "the process has ended")

            patch.setattr(commands, "finish_notice", crash)
            deliver_all(perf.alerts._service, LIMIT_S)
        assert deliver_all(perf.alerts._service, LIMIT_S) == 0, "the lease still holds"
        (outbox,) = raw.keys(f"{namespace}:*:outbox:*")
        raw.zadd(outbox, dict.fromkeys(raw.zrange(outbox, 0, -1), 1.0))  # as if the lease had ended
        assert deliver_all(perf.alerts._service, LIMIT_S) == 1
        first, copy = receiver.ids()
        assert first == copy
        assert raw.exists(outbox) == 0


def test_failed_notification_is_retried_and_shown(
    perf: AgentPerf, history: History, raw: Raw, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    status = [500]
    with Receiver(lambda: status[0]) as receiver:
        perf.alerts.deploy(text=rules(receiver.url))
        evaluated(perf, history.minutes(38, 30))
        assert deliver_all(perf.alerts._service, LIMIT_S) == 1
        of = all_receivers(perf)["ops/0"]
        assert (of.waiting, of.attempts, of.error) == (1, 1, "json://…: apprise could not deliver")
        assert of.failed_at is not None
        (outbox,) = raw.keys(f"{namespace}:*:outbox:*")
        (due_ms,) = (score for _, score in raw.zrange(outbox, 0, -1, withscores=True))
        assert due_ms / 1000 == pytest.approx(of.failed_at + 10, abs=0.1)
        raw.zadd(outbox, dict.fromkeys(raw.zrange(outbox, 0, -1), 1.0))
        status[0] = 200
        assert deliver_all(perf.alerts._service, LIMIT_S) == 1
        assert len(receiver.ids()) == 1
    of = all_receivers(perf)["ops/0"]
    assert (of.waiting, of.attempts, of.error) == (0, 0, None)
    assert "was not delivered: json://…" in caplog.text


def test_hanging_receiver_delays_only_its_own(
    perf: AgentPerf, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hang() -> int:
        go_on.wait(LIMIT_S)
        return 200

    with Receiver(hang) as hanging, Receiver() as receiver:
        perf.alerts.deploy(text=rules(f"{hanging.url}?rto=60", receiver.url))
        evaluated(perf, history.minutes(38, 1))
        deliveries = Deliveries(perf.alerts._service)

        def delivered() -> bool:
            perf.backend.run(deliveries.start_due())
            return len(receiver.posted) == 4

        wait_until(delivered, "all notifications of the other receiver")
        assert hanging.posted == []
        assert all_receivers(perf)["ops/0"].waiting == 4
        monkeypatch.setattr(notify, "SEND_S", 0.0)
        perf.backend.run(deliveries.start_due())
        assert all_receivers(perf)["ops/0"].error == "json://…: no end after 0 s"
        go_on.set()
        assert deliveries.wait(LIMIT_S)


def test_waiting_notifications_are_bounded(
    perf: AgentPerf, backend: Backend, raw: Raw, namespace: str, history: History
) -> None:
    perf.alerts.deploy(text=rules(command=("/bin/false",)))
    service = perf.alerts._service
    for number in range(3):
        claimed = backend.run(commands.claim(service.keys, as_of_ms=60_000 * (number + 1), count=1, token="t"))
        notices = [("ops/command", f"{number}-{n:04d}", "{}") for n in range(90)]
        stored = commands.report(
            service.keys, claimed.version, "failing", "t", states={}, gone=(), events=(), notices=notices
        )
        assert backend.run(stored)
    of = all_receivers(perf)["ops/command"]
    assert (of.waiting, of.dropped) == (200, 70)
    assert raw.hlen(keys.alerts(namespace).notices) == 200
    assert min(raw.zrange(keys.alerts(namespace).outbox("ops/command"), 0, -1)) == "0-0070"
    perf.alerts.deploy(text=FAILING.replace('notify = ["ops"]', ""))
    assert raw.keys(f"{namespace}:*:outbox:*") == []
    assert raw.exists(keys.alerts(namespace).notices) == 0


def test_notification_is_dropped_after_a_day(perf: AgentPerf, history: History, raw: Raw, namespace: str) -> None:
    perf.alerts.deploy(text=rules(command=("/bin/false",)))
    evaluated(perf, history.minutes(38, 30))
    notices = keys.alerts(namespace).notices
    for field, text in raw.hgetall(notices).items():
        raw.hset(notices, field, text.replace("made=1", "made=", 1))  # without its first digit, the time is far earlier
    assert deliver_all(perf.alerts._service, LIMIT_S) == 1
    of = all_receivers(perf)["ops/command"]
    assert (of.waiting, of.attempts, of.dropped) == (0, 1, 1)


def test_command_gets_the_event_as_json(perf: AgentPerf, history: History, tmp_path: Path) -> None:
    place = tmp_path / "got"
    code = f"import sys; open({str(place)!r}, 'w').write(sys.stdin.read())"
    perf.alerts.deploy(text=rules(command=(sys.executable, "-c", code)))
    (event,) = evaluated(perf, history.minutes(38, 33))
    assert deliver_all(perf.alerts._service, LIMIT_S) == 1
    got = json.loads(place.read_text())
    assert (got["id"], got["kind"], got["rule"], got["agent"]) == (event.id, "firing", "failing", "planner")
    assert (got["state"], got["value"], got["when"]) == ("firing", event.value, "errors > 3")


def test_no_output_shows_a_secret(
    perf: AgentPerf, history: History, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with Receiver(lambda: 500) as receiver:
        perf.alerts.deploy(text=rules(receiver.url, "nosuch://hunter2", command=("/no/such/hook", "hunter2")))
        evaluated(perf, history.minutes(38, 1))
        assert deliver_all(perf.alerts._service, LIMIT_S) == 3 * 4
    shown = repr(perf.alerts.list()) + repr(perf.alerts.log()) + caplog.text + "".join(capfd.readouterr())
    assert "json://…" in shown
    assert "hunter2" not in shown
    assert "tok3n" not in shown
