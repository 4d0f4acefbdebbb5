"""The pages about caches: a list of all caches, and a page with the details of one cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from agentperf_redis.cache.flows.ranking import EntryRanking
from agentperf_redis.cache.history import CacheSeriesRow
from agentperf_redis.web.charts.columns import Band, column_chart
from agentperf_redis.web.charts.lines import Line, line_chart
from agentperf_redis.web.charts.small import meter, sparkline
from agentperf_redis.web.pages.asked import PAGE_ROWS, Asked
from agentperf_redis.web.pages.rendering import Page, not_found
from agentperf_redis.web.pages.text import number, share, size


async def caches(views: Any, asked: Asked) -> Page:
    """All caches."""
    view = await views.caches(asked.window, **asked.rows)
    values = {
        "view": view,
        "order": view.order,
        "match": view.match,
        "first": asked.page * PAGE_ROWS,
        "page": asked.page,
        "lines": {
            (row.kind, row.name): sparkline(row.sparkline, f"Hit rate over time, {share(row.recent_hit_rate)} in all")
            for row in view.rows
            if any(each is not None for each in row.sparkline)
        },
        "meters": {
            (row.kind, row.name): meter(
                row.stats.size, row.stats.max_size, f"{number(row.stats.size)} of {number(row.stats.max_size)} entries"
            )
            for row in view.rows
        },
    }
    return Page("caches.html", "Caches", values)


async def cache(views: Any, asked: Asked) -> Page:
    """One cache."""
    name = asked.text("name")
    view = await views.cache(name, asked.window, kind=asked.query.get("kind") or None)
    if view is None:
        return not_found("cache", name)
    steps = view.row.steps
    values = {
        "view": view,
        "service": "tiered" if view.kind == "tiered" else "cache",
        "hit_rate": hit_rate_chart(steps),
        "reads": reads_chart(steps),
        "read_head": ["Hits", "Misses", "Hit rate", "Evictions", "Entries", "Size"],
        "read_rows": [
            (
                step.interval.end,
                [
                    *map(number, (step.hits, step.misses)),
                    share(step.hit_rate),
                    *map(number, (step.evictions, step.size)),
                    size(step.bytes),
                ],
            )
            for step in reversed(steps)
        ],
        "sampled": any(step.size is not None for step in steps),
        "rankings": _rankings(view.entries),
        "meters": {
            tier.name: meter(
                tier.stats.size,
                tier.stats.max_size,
                f"{number(tier.stats.size)} of {number(tier.stats.max_size)} entries",
            )
            for tier in view.tiers
        },
    }
    return Page("cache.html", name, values)


_TITLES = {
    EntryRanking.READS: "Most read",
    EntryRanking.SIZE: "Largest",
    EntryRanking.COST: "Most expensive to compute",
}


def _rankings(entries: Any) -> list[tuple[str, list[Any]]]:
    if entries is None:
        return []
    return [(title, entries.best[by]) for by, title in _TITLES.items() if entries.best.get(by)]


def hit_rate_chart(steps: Sequence[CacheSeriesRow]) -> Markup:
    """Return the chart of the hit rate over time."""
    line = Line("hit rate", [step.hit_rate for step in steps])
    return line_chart(
        [step.interval for step in steps],
        [line],
        share,
        "Line chart of the share of reads that hit, over time",
        top=1.0,
    )


def reads_chart(steps: Sequence[CacheSeriesRow]) -> Markup:
    """Return the chart of hits and misses over time."""
    bands = [
        Band("hits", [step.hits or 0 for step in steps], "s1"),
        Band("misses", [step.misses or 0 for step in steps], "s2"),
    ]
    return column_chart([step.interval for step in steps], bands, number, "Column chart of hits and misses over time")
