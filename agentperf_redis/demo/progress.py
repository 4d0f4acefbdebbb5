"""The progress of a running demo, and its display as plain lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TextIO

WorkerState = Literal["starting", "working", "killed", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Start:
    """The planned run.

    Attributes:
        address: URL of the server, with its password masked.
        socket: the private server's Unix socket; None on the user's own server.
        look: the shell command that shows the keys while the demo runs.
        namespace: prefix of all keys.
        root: folder of the tree.
        files: number of files in the tree.
        workers: number of worker processes.
        kill: whether one worker will be killed.
    """

    address: str
    socket: Path | None
    look: str
    namespace: str
    root: Path
    files: int
    workers: int
    kill: bool


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """The progress of one worker."""

    number: int
    pid: int
    files: int
    state: WorkerState


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The progress of the demo.

    Attributes:
        elapsed: s since the workers started.
        files: number of files that each worker reviews.
        workers: progress of each worker.
        steps: steps done so far by all workers.
        computed: computations begun so far.
        served: results taken from a cache so far.
        leases: leases held now, by agent.
    """

    elapsed: float
    files: int
    workers: tuple[WorkerProgress, ...]
    steps: int
    computed: int
    served: int
    leases: dict[str, int]


class Progress(Protocol):
    """Shows a running demo. The demo's thread calls the methods, so they must be quick."""

    def begin(self, start: Start) -> None:
        """Called when the setup is complete and the workers are about to start."""

    def update(self, snapshot: Snapshot) -> None:
        """Called about ten times per second."""

    def event(self, text: str) -> None:
        """Show an event, as one line of text."""


class PlainProgress:
    """Shows the progress as plain lines, for logs and pipes.

    Args:
        stream: where the lines are written.
        every: minimum time between two progress lines, s.
    """

    def __init__(self, stream: TextIO, every: float = 2.0) -> None:
        self._stream = stream
        self._every = every
        self._next = 0.0

    def begin(self, start: Start) -> None:
        """Print the planned run, and the command that shows the keys of the demo."""
        server = f"a private server on {start.socket}" if start.socket is not None else start.address
        self.event(f"{start.workers} workers review {start.files} files of {start.root}, sharing {server}")
        self.event(f"show the keys while it runs: {start.look}")

    def update(self, snapshot: Snapshot) -> None:
        """Print the progress, at most once per `every` seconds."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        files = " ".join(
            f"{worker.files}" + ("" if worker.state == "working" else f" ({worker.state})")
            for worker in snapshot.workers
        )
        self.event(
            f"{snapshot.elapsed:5.1f} s  files per worker: {files} of {snapshot.files}  steps: {snapshot.steps}  "
            f"computed: {snapshot.computed}  from the cache: {snapshot.served}"
        )

    def event(self, text: str) -> None:
        """Print one line."""
        self._stream.write(text + "\n")
        self._stream.flush()
