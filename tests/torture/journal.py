"""The journals of the workers: a file per process, a JSON list per line. A SIGKILL loses no line that was appended.

All times are seconds of `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A line of a journal.

    Attributes:
        worker: number of the process.
        kind: kind of the line, such as ``"got"`` or ``"read"``.
        at: time of the line.
        values: further values, which depend on the kind.
    """

    worker: int
    kind: str
    at: float
    values: tuple[Any, ...]


class Journal:
    """The journal of one worker, for writing.

    Args:
        folder: the folder of all journals.
        worker: number of the process.
    """

    def __init__(self, folder: Path, worker: int) -> None:
        self._file = os.open(folder / f"{worker}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, kind: str, *values: object) -> float:
        """Append a line; return its time."""
        at = time.monotonic()
        os.write(self._file, json.dumps([kind, at, *values]).encode() + b"\n")
        return at


def lines(folder: Path) -> Iterator[Line]:
    """Return the lines of all journals, one journal after the other. An incomplete last line is left out."""
    for file in sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem)):
        for text in file.read_bytes().split(b"\n")[:-1]:
            kind, at, *values = json.loads(text)
            yield Line(int(file.stem), kind, at, tuple(values))
