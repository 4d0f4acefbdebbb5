"""Delivers notifications: to URLs through the library apprise, and to commands through their standard input.

Each address has a thread of its own while something is sent to it. So an address that fails or hangs delays only its
own notifications. They are retried with backoff, by any process that evaluates alerts.
"""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentperf_redis.alerts import commands
from agentperf_redis.alerts.commands import ClaimedNotice
from agentperf_redis.alerts.flows import AlertService
from agentperf_redis.alerts.rules import Address
from agentperf_redis.command import Flow
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.extras import install_command

_log = logging.getLogger("agentperf_redis")

SEND_S = 30.0
"""An attempt that takes longer counts as failed. The lease of a notification is twice as long."""
_FIRST_RETRY_S, _LAST_RETRY_S = 10.0, 900.0
_SHOWN_CHARACTERS = 200


def retry_after(attempts: int) -> float:
    """Return the seconds to wait after a failed attempt, when `attempts` earlier attempts have also failed."""
    return float(min(_FIRST_RETRY_S * 2 ** min(attempts, 10), _LAST_RETRY_S))


def send(address: Address, payload: str) -> str:
    """Deliver one notification in this thread. Returns the error, without secrets; empty if the delivery succeeded."""
    try:
        notice = json.loads(payload)
    except ValueError:
        return "the stored notification is damaged"
    try:
        return _run(address, payload) if address.command else _post(address, notice)
    except Exception as error:  # noqa: BLE001  no receiver may stop the deliveries to the others
        return f"{address.masked}: {type(error).__name__}"  # the error text may contain the secret URL


def _post(address: Address, notice: Mapping[str, Any]) -> str:
    try:
        import apprise
    except ModuleNotFoundError:
        return f"apprise is not installed: {install_command('alerts')}"
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_quiet)
    _quiet.threads.add(threading.get_ident())
    try:
        # Call the receiver's own `notify`, not `Apprise.notify`. `Apprise` has few threads for all receivers, and
        # receivers that hang would occupy all of these threads.
        sender = apprise.Apprise.instantiate(address.url, suppress_exceptions=True)
        if sender is None:
            return f"{address.masked}: apprise knows no such address"
        kinds = {"resolved": apprise.NotifyType.SUCCESS}
        kind = kinds.get(notice.get("kind", ""), apprise.NotifyType.FAILURE)
        if not sender.notify(body=body_of(notice), title=title_of(notice), notify_type=kind):
            return f"{address.masked}: apprise could not deliver"
        return ""
    finally:
        _quiet.threads.discard(threading.get_ident())


_LOGGERS = ("apprise", "urllib3.connectionpool")


class _Quiet(logging.Filter):
    """Drops the log records of apprise and its HTTP client on a thread that sends: the records may hold secrets."""

    def __init__(self) -> None:
        super().__init__()
        self.threads = set[int]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is logged."""
        return record.thread not in self.threads


_quiet = _Quiet()


def title_of(notice: Mapping[str, Any]) -> str:
    """Return the title of a message."""
    kinds = {"firing": "FIRING", "reminder": "STILL FIRING", "resolved": "RESOLVED"}
    return f"{kinds.get(notice.get('kind', ''), 'ALERT')}: {notice.get('rule')}, {notice.get('target')}"


def body_of(notice: Mapping[str, Any]) -> str:
    """Return the text of a message. Its last line is the id, by which a receiver recognizes a duplicate."""
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(notice.get("at", 0)))
    return (
        f"{notice.get('reason')}\nseverity {notice.get('severity')}, namespace {notice.get('namespace')}, {at}\n"
        f"id {notice.get('id')}"
    )


def _run(address: Address, payload: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603  the operator chose this command
            address.command, input=payload, capture_output=True, text=True, timeout=SEND_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{address.masked}: it ran for more than {SEND_S:g} s"
    except OSError as error:
        return f"{address.masked}: {error.strerror}"
    if done.returncode == 0:
        return ""
    said = " ".join(done.stderr.split())
    for word in address.command[1:]:  # an argument may be a secret
        said = said.replace(word, "…")
    return f"{address.masked}: exit code {done.returncode}{f': {said[:_SHOWN_CHARACTERS]}' if said else ''}"


@dataclass(slots=True)
class _Sending:
    """A notification that a thread is sending."""

    notice: ClaimedNotice
    masked: str
    thread: threading.Thread
    since: float
    is_late: bool = False


class Deliveries:
    """The deliveries of one process.

    Args:
        service: the alerts of the process.
    """

    def __init__(self, service: AlertService) -> None:
        self._service = service
        self._sending: dict[str, _Sending] = {}

    def start_due(self) -> Flow[int]:
        """Start to send the oldest due notification of each address. Returns the number of claimed notifications."""
        deployed = yield from self._service.deployed(self._service.version)
        addresses = {address.name: address for of in deployed.rules.addresses.values() for address in of}
        yield from self._fail_late_ones()
        idle = [name for name in addresses if name not in self._sending]
        if not idle:
            return 0
        claimed = yield from commands.claim_notices(self._service.keys, idle)
        for notice in claimed:
            address = addresses[notice.address]
            thread = threading.Thread(
                target=self._deliver, args=(address, notice), name="agentperf-notify", daemon=True
            )
            self._sending[notice.address] = _Sending(notice, address.masked, thread, time.monotonic())
            try:
                thread.start()
            except RuntimeError:  # the thread limit is reached: the notification is sent after its lease has expired
                del self._sending[notice.address]
        return len(claimed)

    def wait(self, limit_s: float) -> bool:
        """Wait at most `limit_s` seconds until nothing is being sent. Returns whether all attempts have ended."""
        until = time.monotonic() + limit_s
        for sending in list(self._sending.values()):
            sending.thread.join(max(0.0, until - time.monotonic()))
        return not self._sending

    def _fail_late_ones(self) -> Flow[None]:
        """Record each attempt that takes too long as failed. Its thread goes on, and keeps the address busy."""
        for sending in list(self._sending.values()):
            if not sending.is_late and time.monotonic() - sending.since > SEND_S:
                sending.is_late = True
                wait_ms = round(retry_after(sending.notice.attempts) * 1000)
                error = f"{sending.masked}: no end after {SEND_S:g} s"
                _log.warning("notification %s was not delivered: %s", sending.notice.id, error)
                yield from commands.finish_notice(self._service.keys, sending.notice, retry_ms=wait_ms, error=error)

    def _deliver(self, address: Address, notice: ClaimedNotice) -> None:
        try:
            error = send(address, notice.payload)
            sending = self._sending.get(notice.address)
            if error and sending is not None and sending.is_late:  # `_fail_late_ones` has recorded a failure
                return
            if error:
                _log.warning("notification %s was not delivered: %s", notice.id, error)
            wait_ms = round(retry_after(notice.attempts) * 1000) if error else 0
            try:
                self._service.backend.run(
                    commands.finish_notice(self._service.keys, notice, retry_ms=wait_ms, error=error)
                )
            except AgentPerfError as failed:  # the lease expires, and the notification is sent again with the same id
                _log.warning("the delivery of notification %s could not be recorded: %s", notice.id, failed)
        finally:
            self._sending.pop(notice.address, None)


def deliver_all(service: AlertService, limit_s: float) -> int:
    """Send all due notifications, and wait at most `limit_s` seconds for them. Returns how many were claimed."""
    deliveries = Deliveries(service)
    until = time.monotonic() + limit_s
    total = 0
    while started := service.backend.run(deliveries.start_due()):
        total += started
        if not deliveries.wait(max(0.0, until - time.monotonic())):
            break
    return total
