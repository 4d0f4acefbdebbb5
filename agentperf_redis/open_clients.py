"""Warns if a program keeps making clients and never closes them, for example one client for each web request.

Each client has connections and threads of its own. A program needs one client for each server and namespace.
"""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType
from typing import Final

FIRST_WARNING_AT: Final = 10
"""Number of open clients at the first warning. Each further warning comes at ten times the previous number. A program
with a few threads and one client for each thread gets no warning."""

_open: dict[tuple[str, str], int] = {}
"""Address and namespace -> number of clients that have reached the server and were not closed, even if dropped."""


def place_of_creation() -> str:
    """Return the file and line of the code, outside this library, that makes a client."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  the only way to walk up the frames cheaply
    while frame is not None and frame.f_globals.get("__name__", "").startswith("agentperf_redis."):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class OpenClient:
    """One client, from its first contact with the server until it is closed.

    Args:
        address: address of the server, with the password masked.
        namespace: namespace of the client.
        place: where the client was made; see `place_of_creation`.
    """

    def __init__(self, address: str, namespace: str, place: str) -> None:
        self._key = (address, namespace)
        self._place = place
        self._pid = os.getpid()
        self._counted = True
        count = _open[self._key] = _open.get(self._key, 0) + 1
        if str(count) == "1" + "0" * (len(str(count)) - 1) and count >= FIRST_WARNING_AT:
            warnings.warn(
                f"this process has made {count} clients for {address}, namespace {namespace}, without closing them, "
                f"the last one at {place}; make one AgentPerf per process and share it, or close each: "
                "`with AgentPerf() as perf:`",
                RuntimeWarning,
                stacklevel=2,
            )

    def closed(self) -> None:
        """Note that the client was closed. A second call does nothing."""
        if self._counted:
            self._counted = False
            _open[self._key] -= 1

    def __del__(self) -> None:
        # A forked child does not warn, because the client belongs to the parent. At interpreter exit, there is no
        # warning, because all clients are already closed.
        if getattr(self, "_counted", False) and self._pid == os.getpid():
            warnings.warn(
                f"the client for {self._key[0]}, namespace {self._key[1]}, made at {self._place}, was dropped without "
                "`close`",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
