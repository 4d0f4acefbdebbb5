"""A Grafana dashboard over the metrics of the Prometheus exporter, built with Grafana's own SDK.

Needs the extra ``grafana``. The queries take metric names from the table of families, so that both change together.
"""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableOption, VariableRefresh

from agentperf_redis.export import families
from agentperf_redis.export.families import Family
from agentperf_redis.export.text import exposed_name

UID = "agentperf"
_RATE = "$__rate_interval"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_LATEST = common.ReduceDataOptions().calcs(["lastNotNull"])
_WIDTH = 24
"""Columns of Grafana's grid."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel.

    Attributes:
        title: its title.
        unit: unit of its values, as Grafana names it.
        queries: each query in PromQL with the name of its series.
        latest: True shows the latest values as numbers; False draws the values over time as lines.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    latest: bool = False


_SELECTED = 'job=~"$job"'
_OF_AGENT = 'agent=~"$agent"'
_FAILED = 'agent=~"$agent",outcome="failure"'


def _rate(family: Family, by: str = "", where: str = "") -> str:
    selected = f"{exposed_name(family)}{{{_SELECTED}{',' if where else ''}{where}}}"
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({selected}[{_RATE}]))"


def _quantile(share: float, by: str = "") -> str:
    grouped = f"{by}, le" if by else "le"
    bucket = f"{families.DURATIONS.name}_bucket{{{_SELECTED},{_OF_AGENT}}}"
    return f"histogram_quantile({share}, sum by ({grouped}) (rate({bucket}[{_RATE}])))"


def _failure_rate(by: str = "") -> str:
    return f"{_rate(families.EXECUTIONS, by, _FAILED)} / {_rate(families.EXECUTIONS, by, _OF_AGENT)}"


def _hit_rate(by: str) -> str:
    return f"""{_rate(families.CACHE_REQUESTS, by, 'result="hit"')} / {_rate(families.CACHE_REQUESTS, by)}"""


def _gauge(family: Family, by: str, where: str = "") -> str:
    return f"sum by ({by}) ({exposed_name(family)}{{{_SELECTED}{',' if where else ''}{where}}})"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Server reached", "bool_yes_no", ((f"min({families.UP.name}{{{_SELECTED}}})", ""),), latest=True),
        Panel("Executions per second", "ops", ((_rate(families.EXECUTIONS, where=_OF_AGENT), ""),), latest=True),
        Panel("Failure rate", "percentunit", ((_failure_rate(), ""),), latest=True),
        Panel("95th percentile", "s", ((_quantile(0.95), ""),), latest=True),
        Panel("Tokens per second", "short", ((_rate(families.TOKENS, where=_OF_AGENT), ""),), latest=True),
        Panel("Cost per hour", "short", ((f"3600 * {_rate(families.COST, where=_OF_AGENT)}", ""),), latest=True),
    ),
    "Agents": (
        Panel("Executions per second", "ops", ((_rate(families.EXECUTIONS, "agent", _OF_AGENT), "{{agent}}"),)),
        Panel("Failure rate", "percentunit", ((_failure_rate("agent"), "{{agent}}"),)),
        Panel(
            "Durations of all selected agents",
            "s",
            tuple((_quantile(share), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)),
        ),
        Panel("95th percentile by agent", "s", ((_quantile(0.95, "agent"), "{{agent}}"),)),
        Panel(
            "Errors per second by type",
            "ops",
            ((_rate(families.ERRORS, "agent, error_type", _OF_AGENT), "{{agent}} {{error_type}}"),),
        ),
        Panel(
            "Time since the last execution",
            "s",
            ((f"time() - max by (agent) ({families.LAST_EXECUTION.name}{{{_SELECTED},{_OF_AGENT}}})", "{{agent}}"),),
        ),
    ),
    "Models": (
        Panel(
            "Tokens per second", "short", ((_rate(families.TOKENS, "model, type", _OF_AGENT), "{{model}} {{type}}"),)
        ),
        Panel("Cost per hour", "short", ((f"3600 * {_rate(families.COST, 'model', _OF_AGENT)}", "{{model}}"),)),
        Panel(
            "Calls per second",
            "ops",
            (
                (_rate(families.LLM_CALLS, "model", _OF_AGENT), "{{model}}"),
                (_rate(families.TOOL_CALLS, where=_OF_AGENT), "tools"),
            ),
        ),
        Panel(
            "Parts of the tokens per second", "short", ((_rate(families.TOKEN_PARTS, "type", _OF_AGENT), "{{type}}"),)
        ),
    ),
    "Caches": (
        Panel("Hit rate", "percentunit", ((_hit_rate("cache, kind"), "{{cache}} ({{kind}})"),)),
        Panel("Reads per second", "ops", ((_rate(families.CACHE_REQUESTS, "cache, result"), "{{cache}} {{result}}"),)),
        Panel("Size", "bytes", ((_gauge(families.CACHE_BYTES, "cache, kind"), "{{cache}} ({{kind}})"),)),
        Panel(
            "Evictions per second", "ops", ((_rate(families.CACHE_EVICTIONS, "cache, kind"), "{{cache}} ({{kind}})"),)
        ),
    ),
    "Pools": (
        Panel(
            "Load and capacity",
            "short",
            (
                (_gauge(families.POOL_LOAD, "pool"), "{{pool}} load"),
                (_gauge(families.POOL_CAPACITY, "pool"), "{{pool}} capacity"),
            ),
        ),
        Panel("Waiters", "short", ((_gauge(families.POOL_WAITERS, "pool"), "{{pool}}"),)),
        Panel(
            "Instances that are not up",
            "short",
            ((_gauge(families.POOL_INSTANCES, "pool, state", 'state!="up"'), "{{pool}} {{state}}"),),
        ),
        Panel("Leases granted per second", "ops", ((_rate(families.POOL_GRANTED, "pool"), "{{pool}}"),)),
    ),
}


def dashboard() -> str:
    """Return the dashboard as JSON. It has variables for the data source, the job and the agent."""
    built = (
        builders.Dashboard("AgentPerf")
        .uid(UID)
        .tags(["agentperf"])
        .description("Agents, models, caches and pools of a namespace, by agentperf exporter.")
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("job", f"label_values({families.UP.name}, job)"))
        .with_variable(_variable("agent", f"label_values({exposed_name(families.EXECUTIONS)}{{{_SELECTED}}}, agent)"))
    )
    for title, panels in ROWS.items():
        built = built.with_row(builders.Row(title))
        for panel in panels:
            built = built.with_panel(_panel(panel, len(panels)))
    written: str = JSONEncoder(sort_keys=True, indent=2).encode(built.build())
    return written + "\n"


def _variable(name: str, query: str) -> builders.QueryVariable:
    every = VariableOption(selected=True, text="All", value="$__all")
    variable = builders.QueryVariable(name).datasource(_SOURCE).query(query).multi(True).include_all(True)
    return variable.all_value(".*").current(every).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def _panel(panel: Panel, of_row: int) -> stat.Panel | timeseries.Panel:
    built: stat.Panel | timeseries.Panel
    if panel.latest:
        built = stat.Panel().reduce_options(_LATEST).graph_mode(BigValueGraphMode.AREA).height(4).span(_WIDTH // of_row)
    else:
        built = timeseries.Panel().legend(common.VizLegendOptions().show_legend(True)).height(8).span(_WIDTH // 2)
    built = built.title(panel.title).unit(panel.unit).datasource(_SOURCE)
    for number, (query, legend) in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query).legend_format(legend or "__auto").ref_id(chr(ord("A") + number))
        built = built.with_target(target.datasource(_SOURCE))
    return built
