"""One worker process: reviews the whole tree in an order of its own. Started by `agentperf_redis.demo.run`.

Its settings come as one JSON object on stdin, since the URL may hold a password and arguments are for all to see.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.demo.agents import Review
from agentperf_redis.demo.journal import Journal
from agentperf_redis.demo.team import Team
from agentperf_redis.demo.tree import Tree

WORST = 10
"""Files in the list of the worst."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is told.

    Attributes:
        url: the server.
        namespace: prefix of all keys.
        number: of the worker, from 0; the seed of its order.
        parent: pid of who started it; a worker does not outlive it.
        root: folder to review.
        top: see `Tree`.
        files: files to review.
        journal: file to account in.
        lease_ttl: life of a lease without renewal, s.
        last: files after which it waits, with a lease, to be killed; None for a worker that is to finish.
    """

    url: str
    namespace: str
    number: int
    parent: int
    root: str
    top: str
    files: list[str]
    journal: str
    lease_ttl: float
    last: int | None = None

    def to_json(self) -> str:
        """Return the task as it goes to stdin."""
        return json.dumps(asdict(self))


def main() -> None:
    """Do the task on stdin."""
    work(Task(**json.load(sys.stdin)))


def work(task: Task) -> None:
    """Review every file of the task's tree.

    Args:
        task: what to do.
    """
    tree = Tree(Path(task.root), tuple(task.files), Path(task.top))
    order = list(tree.files)
    random.Random(task.number).shuffle(order)
    journal = Journal(Path(task.journal))
    with AgentPerf(task.url, namespace=task.namespace) as perf:
        journal.hello(perf.backend.process)
        team = Team(perf, tree, journal, task.lease_ttl)
        reviews = []
        for number, file in enumerate(order):
            if number == task.last:
                team.hold(lambda: _go_on_for(task))
            _go_on_for(task)
            reviews.append(team.review(file))
        perf.metrics.flush()
    journal.finished(conclude(reviews))
    journal.close()


def _go_on_for(task: Task) -> None:
    if os.getppid() != task.parent:
        sys.exit("the demo that started this worker is gone")


def conclude(reviews: list[Review]) -> dict[str, object]:
    """Return what a worker reports: a digest of all reviews, in whatever order they were made, and the worst files."""
    everything = json.dumps([asdict(review) for review in sorted(reviews, key=lambda review: review.path)])
    worst = sorted(reviews, key=lambda review: (-review.points, review.path))[:WORST]
    return {
        "digest": sha256(everything.encode("utf-8", "surrogatepass")).hexdigest(),
        "lines": sum(review.lines for review in reviews),
        "findings": sum(count for review in reviews for _, count in review.kinds),
        "worst": [asdict(review) for review in worst],
    }


if __name__ == "__main__":
    main()
