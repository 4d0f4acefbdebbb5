"""The wire format of commands, and error replies as values."""

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

    Numbers are converted to text here. If hiredis converts them, a signal handler that raises meanwhile (Ctrl-C) causes
    a segmentation fault (hiredis 3.5.0).
    """
    packed: bytes = hiredis.pack_command(tuple(part if isinstance(part, (str, bytes)) else str(part) for part in parts))  # type: ignore[arg-type]  # its stub says a 1-tuple
    return packed


def pack_call(command: Command[Any], *, by_source: bool, again: bool) -> bytes:
    """Return a Command in wire format.

    Args:
        command: the command.
        by_source: whether to send the source of the script instead of its hash.
        again: whether the command was sent before.
    """
    args = command.wire_args(again=again)
    script = command.script
    if isinstance(script, Script):
        how = ("EVAL", script.source) if by_source else ("EVALSHA", script.sha)
        return pack((*how, len(command.keys), *command.keys, *args))
    return pack((script, *command.keys, *args))
