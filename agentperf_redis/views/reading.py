"""Reads several parts of a view at once. If one part cannot be read, the others are still shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.command import Flow, Together
from agentperf_redis.errors import AgentPerfError, BackendUnavailable
from agentperf_redis.metrics.flusher import Flusher

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """A part of a view that could not be read.

    Attributes:
        part: the part, such as "pools".
        text: the error in words.
    """

    part: str
    text: str


class Parts:
    """Parts of a view, which are read concurrently. Under asyncio, the requests of all parts share pipelines.

    Args:
        flows: the flow that reads each part, by the name of the part.
    """

    def __init__(self, **flows: Flow[Any]) -> None:
        self._flows = flows
        self._found: dict[str, Any] = {}
        self._faults: list[Fault] = []

    def read(self) -> Flow[Parts]:
        """Read all parts.

        Raises:
            BackendUnavailable: the server cannot be reached.
        """
        yield from Together(tuple(self._kept(name, flow) for name, flow in self._flows.items()), "agentperf-view")
        return self

    def get(self, name: str, empty: T) -> T:
        """Return a part, or `empty` if it could not be read."""
        found: T = self._found.get(name, empty)
        return found

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The parts that could not be read, sorted by name."""
        return tuple(sorted(self._faults, key=lambda fault: fault.part))

    def _kept(self, name: str, flow: Flow[Any]) -> Flow[None]:
        try:
            self._found[name] = yield from flow
        except BackendUnavailable:
            raise
        except AgentPerfError as error:
            # A name such as "history of pool my_pool" is no identifier. It contains the name of a cache or pool, whose
            # underscores must stay.
            part = name.replace("_", " ") if name.isidentifier() else name
            self._faults.append(Fault(part, str(error)))


def flusher_of(perf: AgentPerf) -> Flusher:
    """Return the flusher that the flows of metrics need."""
    return perf.metrics._flusher  # noqa: SLF001  the flows are not part of the public API
