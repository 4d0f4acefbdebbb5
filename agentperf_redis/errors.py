"""Every error the library raises, under one root. Errors carry fields; their text is for people, not for parsing."""

from __future__ import annotations

from reprlib import Repr
from typing import Literal

RequestOutcome = Literal["not_applied", "unknown"]
"""What is known of a request that got no answer: it surely did nothing, or it may have been executed."""

_SHOWN_CHARACTERS = 80


class _Brief(Repr):
    """Shows the first items of the first levels: plain repr() of lists that share their items may take for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = 2 * _SHOWN_CHARACTERS

    def repr_instance(self, x: object, level: int) -> str:  # noqa: ARG002  the signature of the base
        return repr(x)


_brief = _Brief()


def shown(value: object) -> str:
    """Return a short, printable form of any value: at most 80 characters, control characters escaped."""
    try:
        text = _brief.repr(value)
    except Exception:  # noqa: BLE001  a value's own __repr__ may fail; the error about the value must not
        text = f"<{type(value).__name__} object>"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


class AgentPerfError(Exception):
    """Root of all errors of this library."""


class InvalidArgument(AgentPerfError, ValueError):
    """An argument was refused before anything was sent.

    Attributes:
        argument: name of the argument.
        value: what was given.
        allowed: what is allowed, in words.
    """

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        super().__init__(argument, value, allowed)
        self.argument = argument
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.argument} is {shown(self.value)}; allowed: {self.allowed}"


class BackendUnavailable(AgentPerfError):
    """The server could not be reached, or did not answer, within the deadline.

    Attributes:
        address: the server, password masked.
        outcome: "not_applied" when the request surely did nothing, "unknown" when it may have been executed.
        reason: what went wrong and what to do, in words.
    """

    def __init__(self, address: str, outcome: RequestOutcome, reason: str) -> None:
        super().__init__(address, outcome, reason)
        self.address = address
        self.outcome: RequestOutcome = outcome
        self.reason = reason

    def __str__(self) -> str:
        applied = "nothing was applied" if self.outcome == "not_applied" else "it may have been applied"
        return f"{self.address}: {self.reason} ({applied})"


class BackendFull(AgentPerfError):
    """The server is at its memory limit and refused to store more. What frees memory still works.

    Attributes:
        address: the server, password masked.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return (
            f"{self.address} is at its maxmemory and refuses writes; raise maxmemory or lower the limits of the caches"
        )


class CorruptState(AgentPerfError):
    """A key holds something this library did not write. Nothing was written.

    Attributes:
        key: the key, or the resource where the very key is not known.
        found: what was found there.
    """

    def __init__(self, key: str, found: str) -> None:
        super().__init__(key, found)
        self.key = key
        self.found = found

    def __str__(self) -> str:
        return f"{self.key} holds {self.found}; something else wrote there: look with redis-cli, then delete the key"


class SchemaMismatch(AgentPerfError):
    """The namespace was written by a newer major version of the library, or the server is too old. Nothing was written.

    Attributes:
        where: the namespace or the server.
        found: the version found.
        needed: what this version of the library needs.
    """

    def __init__(self, where: str, found: str, needed: str) -> None:
        super().__init__(where, found, needed)
        self.where = where
        self.found = found
        self.needed = needed

    def __str__(self) -> str:
        return f"{self.where} is at version {self.found}; this agentperf_redis needs {self.needed}"


class Undecodable(AgentPerfError):
    """Stored bytes are not a value of ours: damaged, foreign, too large, or of a class not registered here.

    Attributes:
        reason: what is wrong with them, in words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"stored bytes cannot be decoded: {self.reason}"


class ScriptFailed(AgentPerfError):
    """The server refused or broke off a request for a reason that is none of the others.

    Attributes:
        operation: name of the script or command.
        message: the server's own words.
    """

    def __init__(self, operation: str, message: str) -> None:
        super().__init__(operation, message)
        self.operation = operation
        self.message = message

    def __str__(self) -> str:
        return f"{self.operation}: {self.message}"


class LeaseLost(AgentPerfError):
    """A lease ended before its holder gave it back: it expired, another released it, or the server lost its data.

    Attributes:
        pool: the agent type.
        token: the lease's token.
        reason: why, in words.
    """

    def __init__(self, pool: str, token: str, reason: str) -> None:
        super().__init__(pool, token, reason)
        self.pool = pool
        self.token = token
        self.reason = reason

    def __str__(self) -> str:
        return f"lease {self.token} of {self.pool} is lost: {self.reason}"


class NoCapacity(AgentPerfError):
    """No instance could be leased in the time given.

    Attributes:
        agent_type: the pool asked.
        reason: why, in words.
        retry_after: seconds until asking again may help.
    """

    def __init__(self, agent_type: str, reason: str, retry_after: float) -> None:
        super().__init__(agent_type, reason, retry_after)
        self.agent_type = agent_type
        self.reason = reason
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"no instance of {self.agent_type} is free: {self.reason}; try again in {self.retry_after:.3f} s"


class ComputeFailed(AgentPerfError):
    """The function behind a cached value raised in another process, which told the others not to try in turn.

    Attributes:
        key: the cache key.
        error_type: class name of the original exception.
        message: its text.
    """

    def __init__(self, key: str, error_type: str, message: str) -> None:
        super().__init__(key, error_type, message)
        self.key = key
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"computing {shown(self.key)} failed elsewhere: {self.error_type}: {self.message}"
