"""Saved runs (`--save`) and regressions since these runs.

Absolute times differ between machines, and between two hours on one machine. So only ratios are compared, and only with
runs on the same kind of machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Row
from tests.support.places import ROOT

PLACE = ROOT / ".benchmarks" / "history.jsonl"
"""One line of JSON per run; not part of the repository."""
_COMPARED_RUNS = 5
"""Number of latest runs whose median is the baseline."""
_WORSE = 1.25
"""A ratio worse than the median by this factor is a regression. Repeated rows on one machine differ by about 20 %."""


@dataclass(frozen=True, slots=True)
class Regression:
    """A row that is worse than the saved runs."""

    work: str
    ratio: float
    before: float
    runs: int

    def __str__(self) -> str:
        return f"{self.work}: {self.ratio:.2f}, was {self.before:.2f} (median of {self.runs})"


def machine() -> str:
    """Return the properties of the machine that affect ratios: processor, cores, system, Python."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def save(rows: Iterable[Row], *, full: bool, place: Path = PLACE) -> None:
    """Append a run to the history."""
    run = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "machine": machine(),
        "full": full,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a") as file:
        file.write(json.dumps(run) + "\n")


def regressions(rows: Iterable[Row], *, full: bool, place: Path = PLACE) -> Iterator[Regression]:
    """Yield the rows whose ratio is worse than their baseline by more than the factor `_WORSE`.

    The baseline is the median of the latest saved rows with the same work and the same reference.
    """
    before: dict[tuple[str, str], list[float]] = {}
    for run in _runs(place):
        if (run["machine"], run["full"]) == (machine(), full):
            for row in run["rows"]:
                if row["ratio"] is not None:
                    before.setdefault((row["work"], _reference_name(row["reference"])), []).append(row["ratio"])
    for row in rows:
        saved = before.get((row.work, _reference_name(row.reference)), [])[-_COMPARED_RUNS:]
        if row.ratio is None or not saved:
            continue
        usual = statistics.median(saved)
        # a goal that begins with >= is a lower bound, so a larger ratio is better
        worse = usual / row.ratio if row.goal.startswith(">=") else row.ratio / usual
        if worse > _WORSE:
            yield Regression(row.work, row.ratio, usual, len(saved))


def _reference_name(reference: str) -> str:
    """Return the name of a reference, without its figure. Two rows may have the same work but different references."""
    return re.split(r":?\s\d", reference, maxsplit=1)[0]


def _runs(place: Path) -> list[dict[str, Any]]:
    if not place.exists():
        return []
    return [json.loads(line) for line in place.read_text().splitlines() if line]


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"
