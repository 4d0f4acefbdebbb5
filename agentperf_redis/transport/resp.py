"""The wire format of commands (RESP), and error replies as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hiredis

from agentperf_redis.command import Command
from agentperf_redis.keys import absent
from agentperf_redis.script import Script


class ServerError:
    """An error reply as a value: the full text of the server, with the error code as its first word."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def pack(parts: Sequence[str | bytes | int]) -> bytes:
    """Return one command in wire format."""
    packed: bytes = hiredis.pack_command(tuple(_texts(parts)))  # type: ignore[arg-type]  # the stub of hiredis declares a 1-tuple
    return packed


def _texts(parts: Sequence[str | bytes | int]) -> list[str | bytes]:
    """Return the parts of a command with numbers converted to text.

    If a signal handler raised an exception, for example at Ctrl-C, while hiredis converts a number, the process would
    end with a segmentation fault (hiredis 3.5.0). Most arguments are exactly a str, so that is tested first.
    """
    return [part if type(part) is str or isinstance(part, (str, bytes)) else str(part) for part in parts]


def needs_whole_slot(command: Command[Any]) -> bool:
    """Whether a command may run only on a node that has all keys of the slot.

    While a slot is moved key by key (CLUSTER SETSLOT, MIGRATE), its keys are on two nodes. A plain command is correct
    on either node: the server checks all keys of the command, and redirects the command if they are on the other node.
    But the server checks only the declared keys of a script. It sends no redirect for the other keys, and none for a
    key that the script itself deletes and writes again. So a script would miss some of its keys on one node, and would
    stop between two writes on the other node. A script with a single key uses no other key, and does not delete its
    key. The tests check that for every script.
    """
    return isinstance(command.script, Script) and len(command.keys) > 1


def pack_call(command: Command[Any], *, by_source: bool, again: bool, scattered: bool = False) -> bytes:
    """Return the request of a `Command` in wire format.

    Args:
        command: the command.
        by_source: whether to send the source of the script (EVAL) instead of its hash (EVALSHA).
        again: whether the command was already sent.
        scattered: whether the server is a Cluster, which must refuse a script while the slot of its keys is being
            moved.
    """
    args = command.wire_args(again=again)
    script, keys = command.script, command.keys
    if isinstance(script, Script):
        if scattered and needs_whole_slot(command):
            keys = (*keys, absent(keys[0]))
        how = ("EVAL", script.source) if by_source else ("EVALSHA", script.sha)
        packed: bytes = hiredis.pack_command((*how, str(len(keys)), *keys, *_texts(args)))  # type: ignore[arg-type]  # as in `pack`
        return packed
    return pack((script, *keys, *args))
