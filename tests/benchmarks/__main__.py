"""`python -m tests.benchmarks [--full] [--only NAME] [--json FILE] [--save]`: measure every performance claim.

The run starts its own server. A benchmark is a module of this package with a function `rows(bench)` that yields `Row`s.
The name of a benchmark is the name of its module.
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
    """Return all benchmarks by name."""
    modules = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            loaded = importlib.import_module(f"{benchmarks.__name__}.{module.name}")
            if hasattr(loaded, "rows"):
                modules[module.name.replace("_", "-")] = loaded
    return modules


def main() -> int:
    """Run the chosen benchmarks and print one table."""
    modules = found()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="use more rounds and larger sizes")
    parser.add_argument("--only", choices=sorted(modules), action="append", help="run this benchmark; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--save", action="store_true", help=f"save the run in {history.PLACE.parent.name}/")
    options, rest = parser.parse_known_args()
    if rest and not options.only:
        parser.error(f"{rest[0]}: an option of some benchmarks only; choose these benchmarks with --only")
    rows: list[Row] = []
    print(f"{'work':<58} {'ours':>12} {'reference':<34} {'ratio':>7}  {'goal':<10} met")
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
        print("\nworse than in the saved runs:", *slower, sep="\n  ")
    if options.save:
        history.save(rows, full=options.full)
    return 0 if all(row.met is not False for row in rows) else 1


def _rows(module: Any, bench: Bench, rest: list[str]) -> Iterator[Row]:
    """Run a benchmark. If its `rows` takes options, pass it the rest of the command line."""
    takes_rest = len(inspect.signature(module.rows).parameters) > 1
    yield from module.rows(bench, rest) if takes_rest else module.rows(bench)


if __name__ == "__main__":
    sys.exit(main())
