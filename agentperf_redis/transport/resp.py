"""The wire format of commands (RESP), and error replies as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hiredis

from agentperf_redis.command import Command
from agentperf_redis.script import Script


class ServerError:
    """An error reply as a value: the full text of the server, with the error code as its first word."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def pack(parts: Sequence[str | bytes | int]) -> bytes:
    """Return one command in wire format.

    Numbers are converted to text before hiredis gets them. If hiredis converts a number and a signal handler raises at
    that moment (Ctrl-C), the process ends with a segmentation fault (hiredis 3.5.0).
    """
    packed: bytes = hiredis.pack_command(tuple(part if isinstance(part, (str, bytes)) else str(part) for part in parts))  # type: ignore[arg-type]  # the stub of hiredis declares a 1-tuple
    return packed


def pack_call(command: Command[Any], *, by_source: bool, again: bool) -> bytes:
    """Return the request of a `Command` in wire format.

    Args:
        command: the command.
        by_source: whether to send the source of the script (EVAL) instead of its hash (EVALSHA).
        again: whether the command was already sent.
    """
    args = command.wire_args(again=again)
    script = command.script
    if isinstance(script, Script):
        how = ("EVAL", script.source) if by_source else ("EVALSHA", script.sha)
        return pack((*how, len(command.keys), *command.keys, *args))
    return pack((script, *command.keys, *args))
