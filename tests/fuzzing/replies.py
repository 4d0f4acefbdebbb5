"""Decoders must turn any reply, even one that no script makes, into a result or a documented error.

Real commands and their replies are recorded first. Then the replies are changed and decoded once more.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

from agentperf_redis.command import Command
from agentperf_redis.errors import AgentPerfError, ScriptFailed
from agentperf_redis.transport import delivery
from tests.support.changed import changed


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Command[Any], Any]]]:
    """Record the commands of this process, each with its reply. Error replies are left out."""
    found: list[tuple[Command[Any], Any]] = []
    decoded = delivery._decoded

    def record(command: Command[Any], reply: Any) -> Any:
        found.append((command, reply))
        return decoded(command, reply)

    with mock.patch.object(delivery, "_decoded", record):
        yield found


def complaints(records: list[tuple[Command[Any], Any]], source: random.Random, rounds: int) -> dict[str, str]:
    """Decode changed replies. Return a complaint for each kind of undocumented error."""
    found: dict[str, str] = {}
    for _ in range(rounds):
        command, reply = source.choice(records)
        for _ in range(source.choice((1, 1, 2, 4))):
            reply = changed(reply, source)
        try:
            command.decode(reply)
        except ScriptFailed as error:
            found[f"{name_of(command)}: {error}"] = repr(reply)
        except AgentPerfError:
            pass
        except Exception as error:  # noqa: BLE001  such an error is what this function looks for
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
            found.setdefault(
                f"{name_of(command)}: {type(error).__name__} at {where}", f"{error!s:.200}; {reply!r:.300}"
            )
    return found


def name_of(command: Command[Any]) -> str:
    """Return the name of a command's script; without a script, the name of the command."""
    return command.script if isinstance(command.script, str) else command.script.name
