"""The pages: each handler reads one view and renders one template."""

from __future__ import annotations

from starlette.routing import Route

from agentperf_redis.web.pages.agents import agent, agents
from agentperf_redis.web.pages.alerts import alerts
from agentperf_redis.web.pages.caches import cache, caches
from agentperf_redis.web.pages.memory import memory
from agentperf_redis.web.pages.overview import overview
from agentperf_redis.web.pages.pools import pool, pools
from agentperf_redis.web.pages.rendering import page_route


def routes() -> list[Route]:
    """Return the routes of all pages."""
    return [
        page_route("/", "overview", overview),
        page_route("/agents", "agents", agents),
        page_route("/agent", "agent", agent, "agents"),
        page_route("/caches", "caches", caches),
        page_route("/cache", "cache", cache, "caches"),
        page_route("/pools", "pools", pools),
        page_route("/pool", "pool", pool, "pools"),
        page_route("/alerts", "alerts", alerts),
        page_route("/memory", "memory", memory),
    ]
