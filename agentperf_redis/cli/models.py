"""The usage of language models: the table and the JSON that several commands share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from rich.table import Table

from agentperf_redis.cli.console import new_table
from agentperf_redis.metrics.model import ModelUsage, PerformanceMetrics

_TOKEN_PARTS = (
    ("cached", "tokens_cached_in"),
    ("cache write", "tokens_cache_write"),
    ("reasoning", "tokens_reasoning"),
)
"""Optional columns: a column is shown only if one of its values is not zero."""


def models_of(agents: Iterable[PerformanceMetrics]) -> dict[str, ModelUsage]:
    """Return the usage of each model, summed over the agents."""
    found: dict[str, ModelUsage] = {}
    for agent in agents:
        for model, use in agent.models.items():
            so_far = found.get(model, ModelUsage())
            sums = {each.name: getattr(so_far, each.name) + getattr(use, each.name) for each in fields(use)}
            found[model] = ModelUsage(**sums)
    return found


def models_table(models: Mapping[str, ModelUsage]) -> Table:
    """Return one row per model, the most called first."""
    parts = [title for title, name in _TOKEN_PARTS if any(getattr(use, name) for use in models.values())]
    table = new_table("models", ["model"], ["calls", "tokens in", "tokens out", *parts, "cost"])
    for model, use in sorted(models.items(), key=lambda item: -item[1].calls):
        counts = [str(getattr(use, name)) for title, name in _TOKEN_PARTS if title in parts]
        table.add_row(model, str(use.calls), str(use.tokens_in), str(use.tokens_out), *counts, f"{use.cost:.6g}")
    return table


def plain_model(use: ModelUsage) -> dict[str, Any]:
    """Return the fields that every --json output has for a model."""
    return {
        "calls": use.calls,
        "tokens_in": use.tokens_in,
        "tokens_out": use.tokens_out,
        "tokens_cached_in": use.tokens_cached_in,
        "tokens_cache_write": use.tokens_cache_write,
        "tokens_reasoning": use.tokens_reasoning,
        "cost": use.cost,
    }
