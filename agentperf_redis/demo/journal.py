"""The journal of a worker: a file with one line per event. It survives a kill of the worker.

Each line is one ``write`` to a file opened with O_APPEND, so every line written before SIGKILL is complete. The checks
of the demo take their counts from the journals, never from the library under test.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Journal:
    """The writing side of a journal, in a worker."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def hello(self, process: str) -> None:
        """Write the library's name for this process."""
        self._write("hello", process)

    def began(self, key: str) -> None:
        """Write that a computation begins. It counts even if it never ends."""
        self._write("began", key)

    def computed(self, key: str, seconds: float) -> None:
        """Write that a computation ended, and how long it took."""
        self._write("computed", key, f"{seconds:.6f}")

    def used(self, key: str) -> None:
        """Write that a result was used, whether computed or cached."""
        self._write("used", key)

    def step(self, agent: str, instance: str) -> None:
        """Write that a step was done on a leased instance, with the time. Call this before the metric is recorded."""
        self._write("step", agent, instance, f"{time.monotonic():.6f}")

    def lost(self, agent: str) -> None:
        """Write that a lease was lost before its step ended."""
        self._write("lost", agent)

    def reviewed(self, file: str) -> None:
        """Write that a file is done."""
        self._write("reviewed", file)

    def finished(self, result: dict[str, Any]) -> None:
        """Write the worker's result. Call this when the whole tree is done."""
        self._write("finished", json.dumps(result))

    def _write(self, *words: str) -> None:
        os.write(self._file, ("\t".join(words) + "\n").encode("utf-8", "surrogateescape"))


@dataclass(slots=True)
class Account:
    """The reading side of a journal: its content so far.

    Attributes:
        path: the file.
        process: the library's name for the process; empty until its hello line is read.
        began: number of computations begun, by key.
        spent: duration in s of the latest computation, by key.
        used: number of uses of a result, by key.
        steps: (time, agent) of each step; the time is in s by the machine's monotonic clock.
        instances: number of steps, by instance.
        lost: number of leases lost while in use.
        files: number of files done.
        result: the worker's result; None until it finishes.
    """

    path: Path
    process: str = ""
    began: Counter[str] = field(default_factory=Counter)
    spent: dict[str, float] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)
    steps: list[tuple[float, str]] = field(default_factory=list)
    instances: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    files: int = 0
    result: dict[str, Any] | None = None
    _read_bytes: int = 0

    def update(self) -> None:
        """Read the lines since the last call. An incomplete line is left for a later call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._read_bytes += end
        for line in data[:end].decode("utf-8", "surrogateescape").split("\n")[:-1]:
            self._apply(line.split("\t"))

    def _apply(self, words: list[str]) -> None:
        match words:
            case ["used", key]:
                self.used[key] += 1
            case ["step", agent, instance, when]:
                self.steps.append((float(when), agent))
                self.instances[instance] += 1
            case ["began", key]:
                self.began[key] += 1
            case ["computed", key, seconds]:
                self.spent[key] = float(seconds)
            case ["reviewed", _]:
                self.files += 1
            case ["lost", _]:
                self.lost += 1
            case ["hello", process]:
                self.process = process
            case ["finished", result]:
                self.result = json.loads(result)
            case _:
                raise ValueError(f"{self.path} has an unknown line {words}")
