"""`python -m tests.torture [--seconds N] [--seed S] [--server KIND] [--mutant NAME]`: all services under random faults.

Worker processes use the balancer, the caches, the metrics and the alerts of one server. Meanwhile, workers are killed
and paused, replies are lost, and requests are delayed. The server is paused, restarted and filled up, and it loses its
scripts and clients. Afterwards, the journals of the workers and the log of the scripts are checked. With a mutant, the
checks must find the fault of the mutant.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import get_args

from tests.support.servers import ServerKind
from tests.torture.mutants import MUTANTS
from tests.torture.run import Torture, first_complaint


def main() -> int:
    """Run once, and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the run")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="seed of the random choices")
    parser.add_argument("--server", choices=get_args(ServerKind), default="valkey", help="kind of the server")
    parser.add_argument("--mutant", choices=MUTANTS, default="", help="a fault in the library, which must be found")
    options = parser.parse_args()
    print(
        f"{options.server}, {options.seconds:g} s, seed {options.seed}" + f", {options.mutant}" * bool(options.mutant)
    )
    if options.mutant:
        found = first_complaint(options.server, options.mutant, options.seconds, options.seed)
        print(f"found: {found}" if found else "not found")
        return 0 if found else 1
    report = Torture(options.server, options.seconds, options.seed).run()
    print(*report.lines(), sep="\n")
    return 1 if report.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
