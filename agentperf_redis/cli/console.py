"""The parts that all commands share: target server, output, exit codes.

Data goes to stdout, everything else to stderr. Colours are off without a terminal, or if NO_COLOR is set.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.backend import DEFAULT_DEADLINE_S
from agentperf_redis.cli import listening, namespaces
from agentperf_redis.cli.tables import FittedTable
from agentperf_redis.embedded import data_folder, running
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument
from agentperf_redis.transport.address import (
    URL_VARIABLES,
    ServerKind,
    parse_url,
    resolve_url,
    url_in_environment,
)
from agentperf_redis.views.text import counted as counted  # noqa: PLC0414  other modules import these names from here
from agentperf_redis.views.text import duration as duration  # noqa: PLC0414
from agentperf_redis.views.text import printable as printable  # noqa: PLC0414
from agentperf_redis.views.text import seconds_cell as seconds_cell  # noqa: PLC0414

T = TypeVar("T")

JSON_VERSION = 1
"""Incremented when a field of any --json output changes its meaning or is removed."""


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    CLOSED_PIPE = 141
    """The reader of stdout ended first, as in ``agentperf agents | head``. The code is 128 + SIGPIPE, as in a shell."""


_SHOWN_NAMESPACES = 10
_ESCAPE = re.compile(r"\\(?:[ntr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U000[0-9a-f]{5}|U0010[0-9a-f]{4})")
"""An escape that `printable` makes."""


class _Console(Console):
    """A console that lets the commands handle a closed pipe. By default, rich ends the process with exit code 1."""

    def on_broken_pipe(self) -> NoReturn:
        self._buffer.clear()  # otherwise the next output would begin with the unwritten text
        raise  # noqa: PLE0704  rich calls this method in its `except BrokenPipeError`


# Printed names come from users, so brackets and colons in a name must not be read as markup or as an emoji. If
# stdout is no terminal and COLUMNS is not set, no line is folded. So each row of a table is one line, for cut and grep.
_WIDTH = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 10_000
out = _Console(markup=False, emoji=False, highlight=False, soft_wrap=not sys.stdout.isatty(), width=_WIDTH)
err = _Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Target:
    """The server, the namespace, the deadline (s) and the output form of a command."""

    url: str | None = None
    namespace: str | None = None
    timeout: float = DEFAULT_DEADLINE_S
    as_json: bool = False

    def resolved(self) -> str | None:
        """Return the URL from the option, the environment or a running embedded server; None means localhost."""
        if self.url is not None or any(os.environ.get(variable) for variable in URL_VARIABLES):
            return self.url
        try:
            folder = data_folder(None)
        except BackendUnavailable:  # without a home folder, the user has no embedded server
            return None
        server = running(folder)
        return server.url if server is not None else None

    def connect(self, *, patient: bool = False) -> AgentPerf:
        """Make the client, if a server listens at the address.

        Args:
            patient: whether to make the client even if no server listens; for commands that wait for a server.

        Raises:
            BackendUnavailable: nothing listens at the address; or the URL names an embedded server that is not running.
                Only `agentperf up` starts an embedded server.
        """
        url = self.resolved()
        address = parse_url(resolve_url(url))
        if address.kind is ServerKind.EMBEDDED and running(data_folder(address.path)) is None:
            up = "agentperf up" + (f" --data {shlex.quote(address.path)}" if address.path else "")
            raise BackendUnavailable(address.masked, "not_applied", f"no server runs there; `{up}` starts it")
        perf = AgentPerf(url, namespace=self.namespace, deadline=self.timeout)
        if not patient:
            try:
                listening.check(address, self.timeout, defaulted=url is None and not url_in_environment())
            except BackendUnavailable:
                perf.close()
                raise
        return perf

    def nothing(self, text: str) -> None:
        """Print on stderr that there is nothing to show. If this namespace is empty, name the namespaces in use."""
        err.print(text)
        self.hint()

    def hint(self) -> None:
        """If this namespace is empty, print the names of the namespaces that are in use on the server."""
        try:
            with self.connect() as perf:
                found = namespaces.others(perf.backend)
                namespace = perf.backend.namespace
        except AgentPerfError:  # for example, no permission for SCAN; print no hint in this case
            return
        if found is None or not found.names:
            return
        names = found.names[:_SHOWN_NAMESPACES]
        shown = ", ".join(names) + ("" if len(names) == len(found.names) else ", ...")
        part = "" if found.complete else " in the part of it that was searched"
        err.print(f"Namespace {namespace} is empty. In use on this server{part}: {shown}; --namespace chooses one.")


class NotFound(Exception):
    """The object of a command does not exist. The text of this error names the object."""


class WrongUsage(Exception):
    """The options of a command do not fit together. The text of this error says what to give."""


_OPTIONS = {
    "as_of": "--as-of",
    "deadline": "--timeout",
    "namespace": "--namespace",
    "step": "--step",
    "url": "--url",
    "window": "--window",
    "other_window": "--other-window",
    "other_as_of": "--other-as-of",
    "max_capacity": "--capacity",
    "weight": "--weight",
    "labels": "--label",
    "requests_per_minute": "--requests-per-minute",
    "tokens_per_minute": "--tokens-per-minute",
    "token": "--token",
    "hosts": "--allow-host",
}
"""Name of an argument of the library -> name of the option on the command line."""


def guarded(work: Callable[[], Exit | None]) -> Exit:
    """Run a command. Errors of the library become a line on stderr and an exit code."""
    try:
        code = _reported(work)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return Exit.CLOSED_PIPE
    return code


def _reported(work: Callable[[], Exit | None]) -> Exit:
    try:
        return work() or Exit.OK
    except NotFound as missing:
        return not_found(str(missing))
    except WrongUsage as misused:
        err.print(f"agentperf: {misused}", style="red")
        return Exit.USAGE
    except InvalidArgument as error:
        option = _OPTIONS.get(error.argument, error.argument)
        allowed = error.allowed.removeprefix("None, ")  # None means that the option is omitted, and cannot be typed
        err.print(f"agentperf: {InvalidArgument(option, error.value, allowed)}", style="red")
        return Exit.USAGE
    except AgentPerfError as error:
        err.print(f"agentperf: {error}", style="red")
        return Exit.UNREACHABLE if isinstance(error, BackendUnavailable) else Exit.FAILURE


def _discard_stdout() -> None:
    """Discard the rest of the output, so that the flush does not fail when the interpreter exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def not_found(what: str) -> Exit:
    """Report a missing object on stderr and return the exit code for it."""
    err.print(f"agentperf: not found: {what}", style="red")
    return Exit.NOT_FOUND


def confirmed(question: str, *, yes: bool) -> Exit | None:
    """Ask for confirmation before data is destroyed, unless `yes` was given.

    Without a terminal the answer is no.

    Returns:
        None to continue, otherwise the exit code.
    """
    if yes:
        return None
    if not (sys.stdin.isatty() and err.is_terminal):
        err.print(
            f"agentperf: {question} There is no terminal to ask on, and --yes was not given: nothing done.", style="red"
        )
        return Exit.USAGE
    err.print(f"{question} [y/N] ", end="")
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return None
    err.print("Nothing done.")
    return Exit.FAILURE


def unescaped(text: str) -> str:
    """Return the text with the escapes of `printable` undone."""
    return _ESCAPE.sub(lambda found: found[0].encode().decode("unicode_escape"), text)


def quoted(*names: str) -> str:
    """Return names in quotes, as `printable` shows them: ``'a', 'b'``."""
    return ", ".join(f"'{printable(name)}'" for name in names)


def new_table(title: str, left: Sequence[str], right: Sequence[str], last: Sequence[str] = ()) -> FittedTable:
    """Make a table without borders: text columns `left`, number columns `right`, then text columns `last`.

    Long texts are folded. Numbers are never cut; see `FittedTable`.
    """
    table = FittedTable(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    for column in last:
        table.add_column(column, overflow="fold")
    return table


def print_json(kind: str, data: Mapping[str, Any]) -> None:
    """Print data as one JSON document, with fields for its kind and version."""
    out.file.write(json.dumps(_document(kind, data), indent=2, ensure_ascii=False) + "\n")


def print_json_line(kind: str, data: Mapping[str, Any]) -> None:
    """Print data as one line of JSON, with fields for its kind and version. For commands that print many lines."""
    out.file.write(json.dumps(_document(kind, data), ensure_ascii=False) + "\n")
    out.file.flush()


def _document(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "version": JSON_VERSION, **data}
