"""`agentperf demo`: show the demo while it runs, and its report at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from agentperf_redis.backend import DEFAULT_DEADLINE_S
from agentperf_redis.cli import listening
from agentperf_redis.cli.console import Exit, err, out, print_json
from agentperf_redis.demo import DemoOptions, PlainProgress, Progress, Snapshot, Start, run_demo
from agentperf_redis.transport.address import parse_url


def demo(
    url: str | None,
    path: Path | None,
    files: int | None,
    workers: int,
    namespace: str | None,
    *,
    kill: bool,
    llm: bool,
    as_json: bool,
) -> Exit:
    """Run the demo. Exit 0 only if every promise was checked and held."""
    if url is not None:
        listening.check(parse_url(url), DEFAULT_DEADLINE_S)
    options = DemoOptions(
        url=url, path=path, files=files, workers=workers, kill=kill and workers > 1, namespace=namespace, llm=llm
    )
    if err.is_terminal:
        with LiveProgress() as progress:
            report = run_demo(options, progress)
    else:
        plain: Progress = PlainProgress(sys.stderr)
        report = run_demo(options, plain)
    if as_json:
        print_json("demo", report.to_dict())
    else:
        for line in report.to_lines():
            out.print(line, soft_wrap=True)
    for failure in report.failures:
        err.print(f"agentperf demo: {failure}", style="red")
    return Exit.OK if report.ok else Exit.FAILURE


class LiveProgress:
    """Draws a bar for each worker, with the counts below, and redraws them in place. Events are printed above."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=err,
        )
        self._tasks: dict[int, TaskID] = {}
        self._counts = Text("")
        self._live = Live(Group(self._bars, self._counts), console=err, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def begin(self, start: Start) -> None:
        """Print the planned run, and the command that shows the keys of the demo."""
        server = f"a private server on {start.socket}" if start.socket is not None else start.address
        self.event(f"{start.workers} workers review {start.files} files of {start.root}, sharing {server}")
        self.event(f"show the keys while it runs: {start.look}")

    def update(self, snapshot: Snapshot) -> None:
        """Redraw the bars and the counts."""
        for worker in snapshot.workers:
            if worker.number not in self._tasks:
                name = f"worker {worker.number} ({worker.pid})"
                self._tasks[worker.number] = self._bars.add_task(name, total=snapshot.files, state="")
            self._bars.update(self._tasks[worker.number], completed=worker.files, state=worker.state)
        leases = ", ".join(f"{agent} {held}" for agent, held in sorted(snapshot.leases.items()))
        self._counts.plain = (
            f"{snapshot.steps} steps, {snapshot.computed} computed, {snapshot.served} from the cache; leases: {leases}"
        )

    def event(self, text: str) -> None:
        """Print a line above the bars."""
        self._live.console.print(text)
