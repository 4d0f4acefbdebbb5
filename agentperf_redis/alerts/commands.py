"""The commands of alerts: their arguments and their replies."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentperf_redis.alerts.model import AlertEvent, TargetState
from agentperf_redis.alerts.rules import RuleSet
from agentperf_redis.alerts.rules_file import stored_rules
from agentperf_redis.command import Command, NamedArgs, Reply, whole_number
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import AlertKeys, decoded, encoded
from agentperf_redis.script import Script

DEPLOY = Script("alerts/deploy")
CLAIM = Script("alerts/claim")
REPORT = Script("alerts/report")
CLAIM_NOTICES = Script("alerts/claim_notices")
FINISH_NOTICE = Script("alerts/finish_notice")
SILENCE = Script("alerts/silence")

DELAY_MS = 2000
"""A window is judged this many ms after its end. By then, the records of other processes have arrived: the default
flush interval is one second, and one second is added."""
LEASE_MS = 60_000
"""Time that a process has to deliver a notification. Afterwards, another process may deliver it."""
KEEP_MS = 86_400_000
"""A notification that cannot be delivered for this long is dropped."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """The rules on the server.

    Attributes:
        version: number of the deployment; 0 before the first one.
        deployed_ms: time of the deployment, ms since 1970.
        rules: the rules and receivers.
    """

    version: int
    deployed_ms: int
    rules: RuleSet


@dataclass(frozen=True, slots=True)
class Claimed:
    """Claimed rules.

    Attributes:
        version: number of the deployment; 0 before the first one.
        wait: seconds until the next rule is due.
        due: for each rule, its name and the end of the window to judge, ms since 1970.
    """

    version: int
    wait: float
    due: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ClaimedNotice:
    """A claimed notification.

    Attributes:
        address: name of the address.
        id: id of the notification.
        attempts: failed attempts so far.
        payload: the notification as JSON.
    """

    address: str
    id: str
    attempts: int
    payload: str


@dataclass(frozen=True, slots=True)
class AddressState:
    """The delivery state of an address.

    Attributes:
        attempts: failed attempts since the last delivery.
        failed_ms: time of the last failed attempt, ms since 1970; 0 if the last one succeeded.
        dropped: notifications that were dropped.
        error: why the last attempt failed; empty if it did not.
    """

    attempts: int = 0
    failed_ms: int = 0
    dropped: int = 0
    error: str = ""


def deploy(where: AlertKeys, rules: RuleSet) -> Command[tuple[int, int]]:
    """Replace all rules. Returns the number of the deployment and the number of removed rules."""
    fields = [part for pair in rules.stored.items() for part in pair]
    schedule = [part for rule in rules.rules for part in (encoded(rule.name), str(rule.every * 1000))]
    addresses = [encoded(address.name) for of in rules.addresses.values() for address in of]

    def decode(reply: Reply) -> tuple[int, int]:
        match reply:
            case [1, int() as version, int() as removed]:
                return version, removed
        raise _unexpected(where.rules, reply)

    args: NamedArgs = {
        "fields": len(rules.stored),
        "scheduled": len(rules.rules),
        "values...": (*fields, *schedule, *addresses),
    }
    return Command(DEPLOY, (where.rules, where.schedule, where.silences, where.notices, where.receivers), args, decode)


def claim(where: AlertKeys, *, as_of_ms: int, count: int, token: str) -> Command[Claimed]:
    """Claim the rules that are due at `as_of_ms`, ms since 1970; -1 stands for the present time."""

    def decode(reply: Reply) -> Claimed:
        match reply:
            case [1, int() as version, int() as wait_ms, *rest] if len(rest) % 2 == 0:
                pairs = zip(rest[::2], rest[1::2], strict=True)
                with contextlib.suppress(AttributeError, TypeError, ValueError):
                    due = tuple((_name_after_write(name), int(at_ms)) for name, at_ms in pairs)
                    return Claimed(version, wait_ms / 1000, due)
        raise _unexpected(where.schedule, reply)

    args: NamedArgs = {"now_ms": as_of_ms, "delay_ms": DELAY_MS, "count": count, "token": token}
    return Command(CLAIM, (where.rules, where.schedule), args, decode)


def report(
    where: AlertKeys,
    version: int,
    rule: str,
    token: str,
    *,
    states: Mapping[str, TargetState],
    gone: Sequence[str],
    events: Sequence[AlertEvent],
    notices: Sequence[tuple[str, str, str]],
) -> Command[bool]:
    """Store the result of an evaluation.

    Args:
        where: the keys.
        version: number of the deployment.
        rule: the rule.
        token: the token of the claim.
        states: the states of its targets.
        gone: targets whose states are deleted.
        events: the transitions.
        notices: address, id and payload of each notification.

    Returns:
        False if rules were deployed after the claim, or if the rule was claimed by a later call.
    """
    targets = [part for name, state in states.items() for part in (encoded(name), state.packed())]
    fields = [part for event in events for pair in event.packed().items() for part in pair]
    sent = [part for address, id_, payload in notices for part in (encoded(address), id_, payload)]
    args: NamedArgs = {
        "version": version,
        "rule": encoded(rule),
        "token": token,
        "targets": len(states),
        "gone": len(gone),
        "happened": len(events),
        "values...": (*targets, *map(encoded, gone), *fields, *sent),
    }
    keys = (where.rules, where.schedule, where.state(rule), where.events, where.notices, where.receivers)
    return Command(REPORT, keys, args, lambda reply: _flag(where.schedule, reply))


def claim_notices(where: AlertKeys, addresses: Sequence[str]) -> Command[list[ClaimedNotice]]:
    """Claim the oldest due notification of each address."""

    def decode(reply: Reply) -> list[ClaimedNotice]:
        match reply:
            case [1, *rest] if len(rest) % 4 == 0:
                with contextlib.suppress(AttributeError):
                    return [
                        ClaimedNotice(
                            _name_after_write(rest[at]),
                            rest[at + 1].decode(errors="replace"),
                            rest[at + 2],
                            rest[at + 3].decode(errors="replace"),
                        )
                        for at in range(0, len(rest), 4)
                    ]
        raise _unexpected(where.notices, reply)

    args: NamedArgs = {"lease_ms": LEASE_MS, "addresses...": tuple(map(encoded, addresses))}
    return Command(CLAIM_NOTICES, (where.notices, where.receivers), args, decode)


def finish_notice(where: AlertKeys, notice: ClaimedNotice, *, retry_ms: int, error: str = "") -> Command[bool]:
    """Record that a notification was delivered (`retry_ms` 0), or schedule the next attempt."""
    args: NamedArgs = {
        "address": encoded(notice.address),
        "id": notice.id,
        "retry_ms": retry_ms,
        "keep_ms": KEEP_MS,
        "error": encoded(error),
    }
    keys = (where.notices, where.outbox(notice.address), where.receivers)
    return Command(FINISH_NOTICE, keys, args, lambda reply: _flag(where.notices, reply))


def silence(
    where: AlertKeys, rules: Sequence[str], *, for_ms: int, as_of_ms: int, event: str
) -> Command[tuple[int, list[str]]]:
    """Silence rules from `as_of_ms` on, or end their silences if `for_ms` is 0.

    Returns the time at which the silence ends, ms since 1970, and the names of those rules that exist.
    """

    def decode(reply: Reply) -> tuple[int, list[str]]:
        match reply:
            case [1, int() as until_ms, *names]:
                with contextlib.suppress(AttributeError):
                    return until_ms, [_name_after_write(name) for name in names]
        raise _unexpected(where.silences, reply)

    args: NamedArgs = {"for_ms": for_ms, "now_ms": as_of_ms, "event": event, "rules...": tuple(map(encoded, rules))}
    return Command(SILENCE, (where.schedule, where.silences, where.events), args, decode)


def rules(where: AlertKeys) -> Command[Deployed]:
    """Read the deployed rules."""

    def decode(reply: Reply) -> Deployed:
        fields = _fields(where.rules, reply)
        try:
            version, deployed_ms = (whole_number(fields.get(name)) for name in ("version", "deployed_ms"))
            return Deployed(version, deployed_ms, stored_rules(fields))
        except (ValueError, RecursionError):
            raise CorruptState(where.rules, "a rule that this library did not write") from None

    return Command("HGETALL", (where.rules,), (), decode)


def states(where: AlertKeys, rule: str) -> Command[dict[str, TargetState]]:
    """Read the states of a rule, by target."""
    key = where.state(rule)

    def decode(reply: Reply) -> dict[str, TargetState]:
        try:
            return {decoded(name): TargetState.unpacked(text) for name, text in _fields(key, reply).items()}
        except ValueError:
            raise CorruptState(key, "a state that this library did not write") from None

    return Command("HGETALL", (key,), (), decode)


def silences(where: AlertKeys) -> Command[dict[str, int]]:
    """Read the ends of all silences, ms since 1970, by rule. Silences that have ended may be among them."""

    def decode(reply: Reply) -> dict[str, int]:
        try:
            return {decoded(name): _time(end) for name, end in _fields(where.silences, reply).items()}
        except ValueError:
            raise CorruptState(where.silences, "an end that is no number") from None

    return Command("HGETALL", (where.silences,), (), decode)


def schedule(where: AlertKeys) -> Command[dict[str, tuple[int, int]]]:
    """Read for each rule its interval, ms, and the time of its next evaluation, ms since 1970."""

    def decode(reply: Reply) -> dict[str, tuple[int, int]]:
        found = {}
        try:
            for name, text in _fields(where.schedule, reply).items():
                every, due, _ = text.split(" ")
                found[decoded(name)] = (_time(every.removeprefix("every=")), _time(due.removeprefix("next=")))
        except ValueError:
            raise CorruptState(where.schedule, "a schedule that this library did not write") from None
        return found

    return Command("HGETALL", (where.schedule,), (), decode)


def receivers(where: AlertKeys) -> Command[dict[str, AddressState]]:
    """Read the delivery states of all addresses."""

    def decode(reply: Reply) -> dict[str, AddressState]:
        found = {}
        try:
            for name, text in _fields(where.receivers, reply).items():
                attempts, failed, dropped, error = (part.partition("=")[2] for part in text.split(" "))
                found[decoded(name)] = AddressState(
                    whole_number(attempts), _time(failed), whole_number(dropped), decoded(error)
                )
        except ValueError:
            raise CorruptState(where.receivers, "a state that this library did not write") from None
        return found

    return Command("HGETALL", (where.receivers,), (), decode)


def waiting(where: AlertKeys, address: str) -> Command[int]:
    """Count the notifications that wait to be sent to an address."""
    key = where.outbox(address)

    def decode(reply: Reply) -> int:
        if not isinstance(reply, int):
            raise _unexpected(key, reply)
        return reply

    return Command("ZCARD", (key,), (), decode)


def events(where: AlertKeys, count: int) -> Command[list[AlertEvent]]:
    """Read the last events, oldest first."""

    def decode(reply: Reply) -> list[AlertEvent]:
        found = []
        try:
            for _, values in reply:
                texts = [value.decode() for value in values]
                found.append(AlertEvent.unpacked(dict(zip(texts[::2], texts[1::2], strict=True))))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CorruptState(where.events, "an event that this library did not write") from None
        return found[::-1]

    return Command("XREVRANGE", (where.events,), ("+", "-", "COUNT", count), decode)


_LAST_MS = 253_402_300_799_000


def _time(text: str) -> int:
    number = whole_number(text)
    if number > _LAST_MS:
        raise ValueError(text)
    return number


def _fields(key: str, reply: Reply) -> dict[str, str]:
    """Decode a reply of HGETALL."""
    if isinstance(reply, dict):
        pairs = list(reply.items())
    elif isinstance(reply, list) and len(reply) % 2 == 0:
        pairs = list(zip(reply[::2], reply[1::2], strict=True))
    else:
        raise _unexpected(key, reply)
    return {_plain_text(key, name): _plain_text(key, value) for name, value in pairs}


def _plain_text(key: str, value: Reply) -> str:
    try:
        return str(value.decode())
    except (AttributeError, UnicodeDecodeError):
        raise _unexpected(key, value) from None


def _text(key: str, value: Reply) -> str:
    return decoded(_plain_text(key, value))


def _name_after_write(value: bytes) -> str:
    """Return a name from the reply of a script that has written.

    An error would hide that the script has written, so a name that is not UTF-8 raises no error. No rule has such a
    name.
    """
    return decoded(value.decode(errors="replace"))


def _flag(key: str, reply: Reply) -> bool:
    if reply not in (0, 1):
        raise _unexpected(key, reply)
    return bool(reply)


def _unexpected(key: str, reply: Reply) -> CorruptState:
    return CorruptState(key, f"an unexpected reply {shown(reply)}")
