"""The page of memory: what takes the space on the server, and how much the metrics will take."""

from __future__ import annotations

from typing import Any

from agentperf_redis.web.charts.small import meter
from agentperf_redis.web.pages.asked import Asked
from agentperf_redis.web.pages.rendering import Page
from agentperf_redis.web.pages.text import share, size


async def memory(views: Any, asked: Asked) -> Page:
    """The memory of the namespace."""
    del asked
    view = await views.memory()
    total = sum(kind.bytes for kind in view.kinds)
    values = {
        "view": view,
        "total": total,
        "meters": {kind.kind: meter(kind.bytes, total, f"{share(kind.share)} of the memory") for kind in view.kinds},
        "forecast": [
            ("Time slices", size(view.forecast.slices)),
            ("Counts of all time", size(view.forecast.totals)),
            ("Raw samples", size(view.forecast.samples)),
            ("In all", size(view.forecast.total)),
        ],
        "full": meter(view.used, view.limit, f"{size(view.used)} of {size(view.limit)} used")
        if view.used is not None and view.limit
        else "",
    }
    return Page("memory.html", "Memory", values, windowed=False, recent=False)
