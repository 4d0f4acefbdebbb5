"""`python -m tests.fuzzing [--seconds N] [--seed S] [--only TEXT] [--server KIND]`: hostile arguments and replies.

The program calls every public callable in rounds. Each round has a new namespace and the next seed. After the calls of
a round, their recorded replies are changed at random and decoded. Each kind of complaint is printed once.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from typing import get_args

from agentperf_redis.errors import AgentPerfError
from tests.fuzzing import replies
from tests.fuzzing.calls import Fuzzer, World, packed
from tests.support.servers import ServerKind, Servers

CALLS, REPLIES = 3000, 50_000
"""Number of calls and of changed replies in a round."""


def one_round(url: str, number: int, only: str, until: float) -> dict[str, str]:
    """Make the calls of one seed, then change their replies and decode them. Returns the complaints."""
    with packed() as counts, replies.recorded() as records:
        world = World(url, f"fuzz{number}")
        fuzzer = Fuzzer(world, counts)
        fuzzer.run(CALLS, only=only, number=number, until=until)
        found = dict(fuzzer.complaints)
        try:
            world.read_everything()
        except AgentPerfError as error:
            found[f"reading: {type(error).__name__}"] = str(error)
        fuzzer.close()
        world.close()
    print(number, dict(fuzzer.ends), flush=True)
    if time.monotonic() < until:
        found |= replies.complaints(records, random.Random(number), REPLIES)
    return found


def main() -> int:
    """Make calls for some time, and print the complaints."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the run")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="seed of the first round")
    parser.add_argument("--only", default="", help="call only the callables whose name contains this text")
    parser.add_argument("--server", choices=get_args(ServerKind), default="valkey", help="kind of the server")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    until = time.monotonic() + options.seconds
    complaints: dict[str, str] = {}
    servers = Servers()
    try:
        url = servers.fresh(options.server).url
        number = options.seed
        while time.monotonic() < until:
            for kind, text in one_round(url, number, options.only, until).items():
                if kind not in complaints:
                    print(kind, "|", text, flush=True)
                    complaints[kind] = text
            number += 1
    finally:
        servers.stop()
    print(len(complaints), "complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
