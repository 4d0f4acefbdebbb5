"""Deploying rules: a file is checked as a whole, and then replaces all deployed rules."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from agentperf_redis.alerts import commands
from agentperf_redis.alerts.flows.service import AlertService
from agentperf_redis.alerts.rules import RuleSet
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument, shown


@dataclass(frozen=True, slots=True)
class Deployment:
    """The result of a deployment.

    Attributes:
        number: number of the deployment; the first one is 1.
        rules: names of the rules.
        receivers: names of the receivers.
        removed: number of rules that were removed.
    """

    number: int
    rules: tuple[str, ...]
    receivers: tuple[str, ...]
    removed: int


def checked_rules(path: str | os.PathLike[str] | None, text: str | None) -> RuleSet:
    """Check the rules of a file, or of a text.

    Raises:
        InvalidArgument: `path` and `text` are both given or both missing, or the file cannot be read.
        InvalidRules: with all faults of the rules.
    """
    if (path is None) == (text is None):
        raise InvalidArgument("path", path, "the path of a rules file, or None with text=")
    if text is not None:
        if not isinstance(text, str):
            raise InvalidArgument("text", text, "the text of a rules file")
        return read_rules(text)
    try:
        text = Path("" if path is None else path).read_text(encoding="utf-8")
    except (OSError, ValueError, TypeError) as error:  # ValueError: a NUL in the path, or a file that is not UTF-8
        raise InvalidArgument("path", path, f"a file of UTF-8 text that can be read ({shown(str(error))})") from None
    return read_rules(text, str(path))


def deploy(service: AlertService, path: str | os.PathLike[str] | None, text: str | None) -> Flow[Deployment]:
    """Replace all rules. The whole file is checked at the call, before the flow runs."""
    return _deploy(service, checked_rules(path, text))


def _deploy(service: AlertService, rules: RuleSet) -> Flow[Deployment]:
    version, removed = yield from commands.deploy(service.keys, rules)
    return Deployment(version, tuple(rule.name for rule in rules.rules), tuple(rules.addresses), removed)
