"""`agentperf cache reshard`: change the number of shards of a cache while programs use it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agentperf_redis.cache.flows.resharding import Resharding
from agentperf_redis.cli.cache import KindOption, Name, gone, on_cache, plain_name
from agentperf_redis.cli.console import Exit, Target, confirmed, counted, err, out, print_json
from agentperf_redis.cli.options import Yes, on_server


@on_server
def reshard(
    target: Target,
    name: Name,
    shards: Annotated[int, typer.Option("--shards", help="Number of shards: a power of two, 1 to 256.", metavar="N")],
    kind: KindOption = None,
    yes: Yes = False,
) -> Exit | None:
    """Change the number of shards of a cache while programs use it. If interrupted, run it again to go on.

    Values stay. Meanwhile calls cost a second round trip. A nearly full cache first evicts a sixteenth of its entries.
    """
    with on_cache(target, name, kind) as (perf, cache):
        change = Resharding(perf.backend, cache.service, cache.name, shards)
        refused = confirmed(f"Move the entries of cache {cache.name} to {counted(shards, 'shard')}?", yes=yes)
        if refused is not None:
            return refused
        begun = state = perf.backend.run(change.begin())
        if begun is None or state is None:
            return gone(cache)
        columns = (TextColumn("moved"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("", total=begun.left)
            while not state.done:
                state = perf.backend.run(change.step())
                bar.update(task, completed=begun.left - state.left)
        if target.as_json:
            figures = {"from": begun.source, "to": state.target, "entries": begun.left}
            print_json("cache reshard", {**plain_name(cache), **figures})
        else:
            moved = counted(begun.left, "entry", "entries")
            out.print(f"Cache {cache.name} has {counted(state.target, 'shard')}; {moved} had to be moved.")
        return None
