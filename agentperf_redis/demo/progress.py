"""What a demo says while it runs, and the plainest way to show it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TextIO

WorkerState = Literal["starting", "working", "killed", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Start:
    """What is about to run.

    Attributes:
        address: the server, password masked.
        socket: the embedded server's Unix socket; None on a server of the user's.
        namespace: prefix of all keys.
        root: the tree.
        files: files in it.
        workers: worker processes.
        kill: whether one of them will be killed.
    """

    address: str
    socket: Path | None
    namespace: str
    root: Path
    files: int
    workers: int
    kill: bool

    @property
    def look(self) -> str:
        """The command that shows the keys while the demo runs."""
        where = f"-s {self.socket}" if self.socket is not None else f"-u {self.address}"
        return f"redis-cli {where} --scan --pattern '{self.namespace}:*'"


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """How far one worker is."""

    number: int
    pid: int
    files: int
    state: WorkerState


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far the demo is.

    Attributes:
        elapsed: s since the workers were started.
        files: files each worker has to review.
        workers: each of them.
        steps: steps done so far, of all.
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
    """Shows a demo while it runs. Called from the thread that runs it; must be quick."""

    def begin(self, start: Start) -> None:
        """All is set up; the workers are about to start."""

    def update(self, snapshot: Snapshot) -> None:
        """Some time passed; called about ten times a second."""

    def event(self, text: str) -> None:
        """Something happened that is worth a line."""


class PlainProgress:
    """Plain lines, for logs and pipes.

    Args:
        stream: where they go.
        every: s between two lines about the progress.
    """

    def __init__(self, stream: TextIO, every: float = 2.0) -> None:
        self._stream = stream
        self._every = every
        self._next = 0.0

    def begin(self, start: Start) -> None:
        """Say what is about to run, and how to look at it."""
        server = f"a private server on {start.socket}" if start.socket is not None else start.address
        self.event(f"{start.workers} workers review {start.files} files of {start.root}, sharing {server}")
        self.event(f"look at the keys while it runs: {start.look}")

    def update(self, snapshot: Snapshot) -> None:
        """Say how far it is, not too often."""
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
        """Write a line."""
        self._stream.write(text + "\n")
        self._stream.flush()
