"""`python -m tests.benchmarks [--full] [--only NAME] [--json FILE] [--save]`: every claim of speed, measured now.

Starts a server of its own. Each module beside this one that has a function `rows(bench)` yielding `Row`s is a benchmark;
its name is the module's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentperf_redis.embedded import private
from tests import benchmarks
from tests.benchmarks import history
from tests.benchmarks.measure import Bench, Row


def found() -> dict[str, Any]:
    """All benchmarks by name."""
    modules = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            loaded = importlib.import_module(f"{benchmarks.__name__}.{module.name}")
            if hasattr(loaded, "rows"):
                modules[module.name.replace("_", "-")] = loaded
    return modules


def main() -> int:
    """Run what was asked for and print one table."""
    modules = found()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="take more rounds and larger sizes")
    parser.add_argument("--only", choices=sorted(modules), action="append", help="run this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--save", action="store_true", help=f"keep the run, in {history.PLACE.parent.name}/")
    options, rest = parser.parse_known_args()
    rows: list[Row] = []
    print(f"{'work':<58} {'ours':>12} {'held against':<34} {'ratio':>7}  {'goal':<10} met")
    for name, module in modules.items():
        if options.only and name not in options.only:
            continue
        with private() as server:
            for row in _rows(module, Bench(server.url, options.full), rest):
                rows.append(row)
                ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
                met = {True: "yes", False: "NO", None: ""}[row.met]
                print(f"{row.work:<58} {row.ours:>12} {row.reference:<34} {ratio:>7}  {row.goal:<10} {met}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    slower = list(history.regressions(rows, full=options.full))
    if slower:
        print("\nworse than in the runs that were kept:", *slower, sep="\n  ")
    if options.save:
        history.save(rows, full=options.full)
    return 0 if all(row.met is not False for row in rows) else 1


def _rows(module: Any, bench: Bench, rest: list[str]) -> Iterator[Row]:
    """A benchmark with options of its own takes what is left of the command line."""
    takes_rest = len(inspect.signature(module.rows).parameters) > 1
    yield from module.rows(bench, rest) if takes_rest else module.rows(bench)


if __name__ == "__main__":
    sys.exit(main())
