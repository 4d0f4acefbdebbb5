"""All errors of the library, with one base class.

Programs should use the attributes of an error; the text of an error is for people.
"""

from __future__ import annotations

from reprlib import Repr
from typing import Literal

RequestOutcome = Literal["not_applied", "unknown"]
"""The known effect of a request without a reply: "not_applied", or "unknown" if the request may have been applied."""

_SHOWN_CHARACTERS = 80


class _Brief(Repr):
    """Makes a repr() of only some items and levels. A plain repr() of lists that share items can take too long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = 2 * _SHOWN_CHARACTERS

    def repr_instance(self, x: object, level: int) -> str:  # noqa: ARG002  signature of the base class
        return repr(x)


_brief = _Brief()


def shown(value: object) -> str:
    """Return a short, printable form of any value: at most 80 characters, control characters escaped."""
    try:
        text = _brief.repr(value)
    except Exception:  # noqa: BLE001  the error about the value must appear even if the value's __repr__ fails
        text = f"<{type(value).__name__} object>"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


class AgentPerfError(Exception):
    """Base class of all errors of this library."""


class InvalidArgument(AgentPerfError, ValueError):
    """An argument was refused before anything was sent.

    Attributes:
        argument: name of the argument.
        value: its value.
        allowed: description of the allowed values.
    """

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        super().__init__(argument, value, allowed)
        self.argument = argument
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.argument} is {shown(self.value)}; allowed: {self.allowed}"


class InvalidRules(InvalidArgument):
    """A rules file was refused before anything was sent, so nothing was deployed.

    Attributes:
        faults: all faults of the file. Each one's `argument` names the file, the line, the rule and the field.
    """

    def __init__(self, faults: tuple[InvalidArgument, ...]) -> None:
        first = faults[0]
        super().__init__(first.argument, first.value, first.allowed)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(map(str, self.faults))


class BackendUnavailable(AgentPerfError):
    """The server was unreachable or did not answer within the deadline.

    Attributes:
        address: the server, password masked.
        outcome: "not_applied" if the request certainly had no effect, "unknown" if it may have been executed.
        reason: description of the fault, with a remedy if one is known.
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
    """The server is at its memory limit and refuses writes. Operations that free memory still work.

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
    """A key holds data that this library did not write. The failed operation wrote nothing.

    Attributes:
        key: the key, or the resource if the exact key is unknown.
        found: description of the data found.
    """

    def __init__(self, key: str, found: str) -> None:
        super().__init__(key, found)
        self.key = key
        self.found = found

    def __str__(self) -> str:
        return (
            f"{self.key} holds {self.found}; another program wrote it: inspect it with redis-cli, then delete the key"
        )


class SchemaMismatch(AgentPerfError):
    """The namespace was written by a newer major version of the library, or the server is too old.

    Nothing was written.

    Attributes:
        where: the namespace or the server.
        found: the version found.
        needed: the version that this library needs.
    """

    def __init__(self, where: str, found: str, needed: str) -> None:
        super().__init__(where, found, needed)
        self.where = where
        self.found = found
        self.needed = needed

    def __str__(self) -> str:
        return f"{self.where} is at version {self.found}; this agentperf_redis needs {self.needed}"


class NoInteger(AgentPerfError, TypeError):
    """`incr` found, or would have stored, a value that is no integer between -2^53 and 2^53. Nothing was changed.

    With ``create=False``, `incr` also raises this error if there is no value.

    Attributes:
        key: the cache key.
        reason: description of the cause.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{shown(self.key)} must hold an integer between -2^53 and 2^53: {self.reason}"


class Undecodable(AgentPerfError):
    """Stored bytes cannot be decoded: they are damaged, foreign or too large, or name an unregistered class.

    Attributes:
        reason: description of the fault.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"stored bytes cannot be decoded: {self.reason}"


class ScriptFailed(AgentPerfError):
    """The server refused or aborted a request for a reason that no other error covers.

    Attributes:
        operation: name of the script or command.
        message: the text of the server.
    """

    def __init__(self, operation: str, message: str) -> None:
        super().__init__(operation, message)
        self.operation = operation
        self.message = message

    def __str__(self) -> str:
        return f"{self.operation}: {self.message}"


class LeaseLost(AgentPerfError):
    """A lease ended before its holder released it.

    The lease expired, another caller released it, or the server lost its data.

    Attributes:
        pool: the agent type.
        token: the token of the lease.
        reason: description of the cause.
    """

    def __init__(self, pool: str, token: str, reason: str) -> None:
        super().__init__(pool, token, reason)
        self.pool = pool
        self.token = token
        self.reason = reason

    def __str__(self) -> str:
        return f"lease {self.token} of {self.pool} is lost: {self.reason}"


class LockError(AgentPerfError):
    """A lock or semaphore is not in the state that the call needs: it was not acquired in time, or it is not held.

    Attributes:
        name: the name of the lock or semaphore.
        reason: description of the cause.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name!r}: {self.reason}"


class LockNotOwned(LockError):
    """A lock or semaphore was lost before its holder released it: the lease expired, or the server lost its data."""


class NoCapacity(AgentPerfError):
    """No instance could be leased within the given time.

    Attributes:
        agent_type: the agent type of the pool.
        reason: description of the cause.
        retry_after: seconds until a retry may succeed.
        none_exists: True if no fallback pool was named and the pool has no suitable instance: none at all, or none with
            the required labels. In this case a retry cannot succeed before a suitable instance is registered.
    """

    def __init__(self, agent_type: str, reason: str, retry_after: float, none_exists: bool = False) -> None:
        super().__init__(agent_type, reason, retry_after, none_exists)
        self.agent_type = agent_type
        self.reason = reason
        self.retry_after = retry_after
        self.none_exists = none_exists

    def __str__(self) -> str:
        if self.none_exists:
            return self.reason
        return f"no instance of {self.agent_type} is free: {self.reason}; try again in {self.retry_after:.3f} s"


class ComputeFailed(AgentPerfError):
    """The function that computes a cached value failed in another process.

    The processes that waited for the value get this error, so that they do not all repeat the failing call.

    Attributes:
        key: the cache key.
        error_type: class name of the original exception.
        message: text of the original exception.
    """

    def __init__(self, key: str, error_type: str, message: str) -> None:
        super().__init__(key, error_type, message)
        self.key = key
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"computing {shown(self.key)} failed elsewhere: {self.error_type}: {self.message}"
