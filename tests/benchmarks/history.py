"""Runs that were kept (`--save`), and what has become slower since: absolute times differ between machines and hours,
so ratios are compared, and only with runs on a machine of the same kind."""

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
"""One JSON document a line and run; not part of the repository."""
_LOOKED_BACK = 5
"""Runs whose median is compared with."""
_WORSE = 1.25
"""Times the median that count as a regression: rows repeated on one machine differ by about a fifth."""


@dataclass(frozen=True, slots=True)
class Regression:
    """A row that is worse than it was."""

    work: str
    ratio: float
    before: float
    runs: int

    def __str__(self) -> str:
        return f"{self.work}: {self.ratio:.2f}, was {self.before:.2f} (median of {self.runs})"


def machine() -> str:
    """What ratios depend on besides the code: the processor, the system, the Python."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def save(rows: Iterable[Row], *, full: bool, place: Path = PLACE) -> None:
    """Append a run."""
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
    """Compare a run with those that were kept before it, row by row: ratios over what they are held against."""
    before: dict[tuple[str, str], list[float]] = {}
    for run in _runs(place):
        if (run["machine"], run["full"]) == (machine(), full):
            for row in run["rows"]:
                if row["ratio"] is not None:
                    before.setdefault((row["work"], _peer(row["reference"])), []).append(row["ratio"])
    for row in rows:
        kept = before.get((row.work, _peer(row.reference)), [])[-_LOOKED_BACK:]
        if row.ratio is None or not kept:
            continue
        usual = statistics.median(kept)
        # what has a goal from below, such as a share that is used, is the better the larger it is
        worse = usual / row.ratio if row.goal.startswith(">=") else row.ratio / usual
        if worse > _WORSE:
            yield Regression(row.work, row.ratio, usual, len(kept))


def _peer(reference: str) -> str:
    """Who it is held against, without the figure: several rows of one work differ in that."""
    return re.split(r":?\s\d", reference, maxsplit=1)[0]


def _runs(place: Path) -> list[dict[str, Any]]:
    if not place.exists():
        return []
    return [json.loads(line) for line in place.read_text().splitlines() if line]


def _commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"
