"""The rights of ACL users, and `agentperf doctor --acl`, which prints them as commands for redis-cli.

Tests check that a user with these rights can do its work, and that each right is needed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from agentperf_redis.backend import Backend, resolve_namespace
from agentperf_redis.cli.console import Exit, Target, err, out, print_json
from agentperf_redis.cli.doctor import find_layout
from agentperf_redis.command import Reply
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument
from agentperf_redis.keys import check_namespace
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import ExchangeFailed, unavailable
from agentperf_redis.transport.resp import ServerError, pack

PLACEHOLDER = "REPLACE-WITH->PASSWORD"
"""Stands for the rule that sets the password. Until it is replaced, servers refuse the command and create no user."""
CONNECTING = ("ping", "echo", "select", "asking", "cluster|slots")
"""Rights for connections. The last two are needed on a Cluster only."""
_WORKER = (
    *CONNECTING,
    *("eval", "evalsha", "time", "type", "exists", "pttl", "get", "getrange", "mget", "set", "unlink", "rename"),
    *("pexpire", "pexpireat", "pexpiretime", "persist", "ssubscribe", "sunsubscribe", "spublish", "hget", "hmget"),
    *("hgetall", "hset", "hsetnx", "hdel", "hexists", "hlen", "hincrby", "hscan", "hrandfield", "zadd", "zrem"),
    *("zcard", "zcount"),
    *("zscore", "zmscore", "zrank", "zrange", "zrangebyscore", "zrevrange", "zscan", "zdiff", "zpopmin"),
    *("zremrangebyrank", "zremrangebyscore", "zunionstore", "rpush", "lpop", "llen", "lindex", "lrange", "ltrim"),
    *("xadd", "xlen", "xrange", "xrevrange"),
)
MEMORY = ("scan", "info", "memory|usage")
"""Rights for the page that shows the memory, and for the list of the namespaces in use."""
_READ_ONLY = (
    *CONNECTING,
    *("eval", "evalsha", "time", "type", "exists", "getrange", "mget", "hget", "hmget", "hgetall", "hlen", "hscan"),
    *("zcard", "zrange", "zrangebyscore", "lrange", "llen", "xlen", "xrevrange"),
    *MEMORY,
)
_USER = re.compile(r"[A-Za-z0-9_.@-]{1,64}")


def rights(*, read_only: bool = False) -> tuple[str, ...]:
    """Return the commands that a worker may run; if `read_only`, those for `agentperf serve` and `agentperf top`.

    Subcommands are written as in ``cluster|slots``.
    """
    return _READ_ONLY if read_only else _WORKER


def rules(namespace: str, *, read_only: bool = False, password: str = PLACEHOLDER) -> list[str]:
    """Return the rules that ``ACL SETUSER <name>`` takes.

    They replace all earlier rules of the user.

    Args:
        namespace: prefix of the keys and channels that the user may use.
        read_only: whether the user only reads.
        password: the rule for the password, such as ``>secret`` or ``#<SHA-256 of the password>``.
    """
    patterns = [f"~{namespace}:*"] if read_only else [f"~{namespace}:*", f"&{namespace}:*"]
    return ["reset", "on", password, *patterns, *(f"+{right}" for right in rights(read_only=read_only))]


def acl(target: Target, user: str | None, *, read_only: bool) -> Exit:
    """Print the command that makes an ACL user for the namespace, and advice on stderr.

    If the server can be reached, the commands that it lacks are named too.
    """
    name = _checked(user, "dashboard" if read_only else "worker")
    namespace = check_namespace("namespace", resolve_namespace(target.namespace))
    set_by = rules(namespace, read_only=read_only)
    line = shlex.join(["ACL", "SETUSER", name, *set_by])
    lacking, reason = _compared(target, rights(read_only=read_only))
    if target.as_json:
        print_json(
            "acl",
            {
                "user": name,
                "namespace": namespace,
                "read_only": read_only,
                "rules": set_by,
                "command": line,
                "password_rule": PLACEHOLDER,
                "compared": not reason,
                "lacking": lacking,
            },
        )
    else:
        out.print(line, soft_wrap=True)
    err.print(
        f"Replace {PLACEHOLDER} with >PASSWORD or #SHA256-OF-PASSWORD, and run the line in redis-cli on every server: "
        "users are not replicated. ACL SAVE or CONFIG REWRITE keeps them over a restart."
    )
    if lacking:
        err.print(
            f"This server lacks {', '.join(lacking)} (too old, or rename-command): leave out these rights, and look at "
            "what `agentperf doctor` finds."
        )
    if reason:
        err.print(f"Not compared with the commands of a server: {reason}")
    return Exit.OK


def _checked(user: str | None, default: str) -> str:
    if user is None:
        return default
    if not _USER.fullmatch(user):
        raise InvalidArgument("--user", user, "1 to 64 characters of A-Z a-z 0-9 _ . @ -")
    return user


def _compared(target: Target, wanted: Sequence[str]) -> tuple[list[str], str]:
    """Return the commands that the server lacks, and the reason if the server could not be queried."""
    try:
        with target.connect() as perf:
            return _lacking(perf.backend, wanted), ""
    except InvalidArgument:
        raise
    except BackendUnavailable as error:
        return [], error.reason
    except AgentPerfError as error:
        return [], str(error)


def _lacking(backend: Backend, wanted: Sequence[str]) -> list[str]:
    (node, *_) = find_layout(backend).primaries
    try:
        reply = Connector(backend.address).request(node, pack(("COMMAND", "INFO", *wanted)), backend.deadline)
    except ExchangeFailed as failed:
        raise unavailable(backend.address.masked, maybe_applied=False, reason=failed.reason) from None
    return unknown(wanted, reply)


def unknown(wanted: Sequence[str], reply: Reply) -> list[str]:
    """Return the commands without a description in a reply to COMMAND INFO.

    Raises:
        AgentPerfError: the user may not run COMMAND INFO.
    """
    if isinstance(reply, ServerError):
        raise AgentPerfError(reply.text)
    described = reply if isinstance(reply, list) else []
    return [name for name, known in zip(wanted, described, strict=False) if not known]
