"""What the commands share: which server, where text goes, what exit codes mean.

Data goes to stdout, everything else to stderr. Colours are off without a terminal, and where NO_COLOR is set.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from rich.console import Console

from agentperf_redis.address import URL_VARIABLES
from agentperf_redis.backend import DEFAULT_DEADLINE_S
from agentperf_redis.embedded import data_folder, running
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument, SchemaMismatch
from agentperf_redis.service import AgentPerf

T = TypeVar("T")

JSON_VERSION = 1
"""Raised when a field of some --json output changes its meaning or goes."""


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    UNREACHABLE = 3


out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Target:
    """Which server and namespace a command works on."""

    url: str | None = None
    namespace: str | None = None
    timeout: float = DEFAULT_DEADLINE_S

    def resolved(self) -> str | None:
        """Return the URL: given, of the environment, of a running embedded server; None stands for localhost."""
        if self.url is not None or any(os.environ.get(variable) for variable in URL_VARIABLES):
            return self.url
        server = running(data_folder(None))
        return f"unix://{server.socket}" if server is not None else None

    def connect(self) -> AgentPerf:
        """Make the client; nothing is sent yet."""
        return AgentPerf(self.resolved(), namespace=self.namespace, deadline=self.timeout)


def guarded(work: Callable[[], Exit | None]) -> Exit:
    """Do the work of a command and turn the library's errors into a line on stderr and an exit code."""
    try:
        return work() or Exit.OK
    except InvalidArgument as error:
        err.print(f"agentperf: {error}", style="red", markup=False)
        return Exit.USAGE
    except BackendUnavailable as error:
        err.print(f"agentperf: {error}", style="red", markup=False)
        if "agentperf up" not in str(error):
            err.print("`agentperf up` starts a server on this machine; --url names another one.")
        return Exit.UNREACHABLE
    except SchemaMismatch as error:
        err.print(f"agentperf: {error}", style="red", markup=False)
        return Exit.FAILURE
    except AgentPerfError as error:
        err.print(f"agentperf: {error}", style="red", markup=False)
        return Exit.FAILURE


def counted(number: int, noun: str) -> str:
    """Return ``1 task`` or ``2 tasks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_json(kind: str, data: Mapping[str, Any]) -> None:
    """Print data as one JSON document that names its kind and version."""
    document = {"kind": kind, "version": JSON_VERSION, **data}
    out.file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
