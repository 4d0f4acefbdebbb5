"""One worker process. It reviews the whole tree in its own order. `agentperf_redis.demo.run` starts it.

The worker reads its task, a JSON object, from stdin. The task contains the URL, which may contain a password. If the
task were an argument of the process, other users of the machine could read it.
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
"""Number of files in the list of the worst files."""


@dataclass(frozen=True, slots=True)
class Task:
    """The task of a worker.

    Attributes:
        url: the server.
        namespace: prefix of all keys.
        number: number of the worker, from 0. It is also the seed of the order in which the worker reviews the files.
        parent: pid of the process that started the worker. The worker ends soon after that process.
        root: folder to review.
        top: see `Tree`.
        files: paths to review.
        journal: path of the worker's journal.
        lease_ttl: TTL of a lease without renewal, s.
        last: number of files after which the worker leases an instance and waits to be killed; None if the worker
            reviews all files.
        llm: whether each step is also recorded as a model call.
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
    llm: bool = False

    def to_json(self) -> str:
        """Return the task as JSON, for stdin."""
        return json.dumps(asdict(self))


def main() -> None:
    """Run the task from stdin."""
    work(Task(**json.load(sys.stdin)))


def work(task: Task) -> None:
    """Review every file of the task's tree.

    Args:
        task: the task of this worker.
    """
    tree = Tree(Path(task.root), tuple(task.files), Path(task.top))
    order = list(tree.files)
    random.Random(task.number).shuffle(order)
    journal = Journal(Path(task.journal))
    with AgentPerf(task.url, namespace=task.namespace) as perf:
        journal.hello(perf.backend.process)
        team = Team(perf, tree, journal, task.lease_ttl, llm=task.llm)
        reviews = []
        for number, file in enumerate(order):
            if number == task.last:
                team.hold(lambda: _exit_without_parent(task))
            _exit_without_parent(task)
            reviews.append(team.review(file))
        perf.metrics.flush()
    journal.finished(conclude(reviews))
    journal.close()


def _exit_without_parent(task: Task) -> None:
    if os.getppid() != task.parent:
        sys.exit("the demo that started this worker is gone")


def conclude(reviews: list[Review]) -> dict[str, object]:
    """Return a worker's result: the worst files, and a digest of all reviews that does not depend on their order."""
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
