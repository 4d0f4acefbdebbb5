"""Tests of the rules of ACL users, without a server."""

from __future__ import annotations

import pytest

from agentperf_redis.cli import acl
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.transport.resp import ServerError


@pytest.mark.parametrize("read_only", [False, True])
def test_no_right_is_granted_twice(read_only: bool) -> None:
    granted = acl.rights(read_only=read_only)
    assert len(granted) == len(set(granted))


def test_rules_remove_earlier_rights_first() -> None:
    assert acl.rules("ns")[:5] == ["reset", "on", acl.PLACEHOLDER, "~ns:*", "&ns:*"]


def test_reading_user_gets_no_channel_and_no_command_that_writes() -> None:
    given = acl.rules("ns", read_only=True)
    assert not any(rule.startswith("&") for rule in given)
    writing = {"set", "unlink", "hset", "hdel", "zadd", "zrem", "xadd", "rpush", "ltrim", "pexpire", "spublish"}
    assert not writing & set(acl.rights(read_only=True))
    assert writing <= set(acl.rights())


def test_unknown_commands_are_those_without_a_description() -> None:
    assert acl.unknown(("ping", "newer", "cluster|slots"), [[b"ping", -1], None, []]) == ["newer", "cluster|slots"]


def test_refused_query_is_not_an_answer() -> None:
    with pytest.raises(AgentPerfError, match="NOPERM"):
        acl.unknown(("ping",), ServerError("NOPERM no permission to run 'command|info'"))
