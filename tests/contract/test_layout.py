"""The test folders mirror the package, and no file imports from a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import ROOT

TESTS = ROOT / "tests"
PACKAGE = ROOT / "agentperf_redis"
INTEGRATION = "tests/integration"

# Modules without a unit test of their own, each with the test that covers it. Most of them do only I/O with a server.
PROVEN_BY = {
    "alerts/async_client.py": "tests/contract/test_parity.py",
    "alerts/backtest.py": f"{INTEGRATION}/alerts/test_replay.py",
    "alerts/client.py": f"{INTEGRATION}/alerts/test_evaluation.py",
    "alerts/evaluator.py": f"{INTEGRATION}/alerts/test_evaluator.py",
    **{
        f"alerts/flows/{name}.py": f"{INTEGRATION}/alerts/test_evaluation.py"
        for name in ("deployment", "evaluation", "reading", "service", "silences", "targets")
    },
    "alerts/rules.py": "tests/unit/alerts/test_rules_file.py",
    "backend.py": f"{INTEGRATION}/transport/test_executor.py",
    "balancer/flows/acquiring_many.py": "tests/unit/balancer/flows/test_acquiring.py",
    "balancer/flows/blocks.py": "tests/unit/balancer/flows/test_acquiring.py",
    "balancer/flows/elsewhere.py": f"{INTEGRATION}/balancer/test_shards.py",
    "balancer/async_client.py": "tests/unit/balancer/test_client.py",
    "balancer/flows/queue.py": f"{INTEGRATION}/balancer/test_queue.py",
    "balancer/flows/releasing.py": f"{INTEGRATION}/balancer/test_leases.py",
    "balancer/flows/selecting.py": f"{INTEGRATION}/balancer/test_leases.py",
    "balancer/flows/undoing.py": "tests/unit/balancer/flows/test_acquiring.py",
    "balancer/history.py": f"{INTEGRATION}/test_history.py",
    "balancer/lease.py": "tests/unit/balancer/flows/test_acquiring.py",
    "balancer/lease_keeper.py": f"{INTEGRATION}/balancer/test_faults.py",
    "balancer/server_clock.py": f"{INTEGRATION}/balancer/test_faults.py",
    "cache/async_client.py": "tests/contract/test_parity.py",
    "metrics/async_client.py": "tests/contract/test_parity.py",
    "cache/arguments.py": "tests/unit/cache/test_client.py",
    "cache/flows/access_reports.py": "tests/unit/cache/process/test_access_buffer.py",
    "cache/flows/cancelling.py": f"{INTEGRATION}/cache/test_conditional_writes.py",
    "cache/flows/inspection.py": f"{INTEGRATION}/cache/test_entries.py",
    "cache/flows/invalidation.py": f"{INTEGRATION}/cache/test_outages.py",
    "cache/flows/resharding.py": f"{INTEGRATION}/cache/test_resharding.py",
    "cache/flows/ranking.py": f"{INTEGRATION}/cli/test_cache.py",
    "cache/flows/reads.py": f"{INTEGRATION}/cache/test_entries.py",
    "cache/flows/settings.py": f"{INTEGRATION}/cache/test_existing.py",
    "cache/flows/single_flight.py": f"{INTEGRATION}/cache/test_computing.py",
    "cache/flows/writes.py": f"{INTEGRATION}/cache/test_entries.py",
    "cache/function_keys.py": "tests/unit/cache/test_decorator.py",
    "cache/history.py": f"{INTEGRATION}/test_history.py",
    "cache/lru.py": "tests/stateful/cache/test_lru.py",
    "cache/maintenance.py": f"{INTEGRATION}/cache/test_reliability.py",
    "cache/operator.py": f"{INTEGRATION}/cache/test_existing.py",
    "cache/process/compute_lease.py": f"{INTEGRATION}/cache/test_computing.py",
    "cache/process/shard.py": f"{INTEGRATION}/cache/test_shards.py",
    "cache/tiered.py": "tests/stateful/cache/test_tiered.py",
    "cli/agents.py": f"{INTEGRATION}/cli/test_metrics.py",
    "cli/alerts.py": f"{INTEGRATION}/cli/test_alerts.py",
    "cli/app.py": f"{INTEGRATION}/cli/test_app.py",
    "cli/attempts.py": "tests/contract/test_acl.py",
    "cli/balancer.py": f"{INTEGRATION}/cli/test_balancer.py",
    "cli/cache.py": f"{INTEGRATION}/cli/test_cache.py",
    "cli/reshard.py": f"{INTEGRATION}/cache/test_resharding.py",
    "cli/console.py": f"{INTEGRATION}/cli/test_status.py",
    "cli/demo.py": f"{INTEGRATION}/demo/test_run.py",
    "cli/doctor_plan.py": f"{INTEGRATION}/cli/test_doctor_plan.py",
    "cli/plan_costs.py": f"{INTEGRATION}/cli/test_doctor_plan.py",
    "cli/embedded.py": f"{INTEGRATION}/cli/test_embedded.py",
    "cli/documents.py": f"{INTEGRATION}/cli/test_export.py",
    "cli/export.py": f"{INTEGRATION}/cli/test_export.py",
    "cli/exporter.py": f"{INTEGRATION}/cli/test_exporter.py",
    "cli/extras.py": f"{INTEGRATION}/cli/test_exporter.py",
    "cli/inspect.py": f"{INTEGRATION}/cli/test_inspect.py",
    "cli/models.py": f"{INTEGRATION}/cli/test_status.py",
    "cli/metrics.py": f"{INTEGRATION}/cli/test_metrics.py",
    "cli/namespaces.py": f"{INTEGRATION}/cli/test_namespaces.py",
    "cli/options.py": f"{INTEGRATION}/cli/test_app.py",
    "cli/pools.py": f"{INTEGRATION}/cli/test_pools.py",
    "cli/series.py": f"{INTEGRATION}/cli/test_series.py",
    "cli/serve.py": f"{INTEGRATION}/cli/test_serve.py",
    "cli/status.py": f"{INTEGRATION}/cli/test_status.py",
    "cli/top.py": f"{INTEGRATION}/cli/test_top.py",
    "cli/workers.py": f"{INTEGRATION}/cli/test_workers.py",
    "cli/version.py": f"{INTEGRATION}/cli/test_app.py",
    "demo/journal.py": "tests/unit/demo/test_checks.py",
    "demo/leftovers.py": f"{INTEGRATION}/demo/test_run.py",
    "demo/progress.py": f"{INTEGRATION}/demo/test_run.py",
    "demo/report.py": f"{INTEGRATION}/demo/test_run.py",
    "demo/run.py": f"{INTEGRATION}/demo/test_run.py",
    "demo/team.py": f"{INTEGRATION}/demo/test_run.py",
    "demo/tree.py": "tests/unit/demo/test_agents.py",
    "demo/worker.py": f"{INTEGRATION}/demo/test_run.py",
    "embedded.py": f"{INTEGRATION}/test_embedded.py",
    "errors.py": f"{INTEGRATION}/transport/test_outages.py",
    "export/reading.py": f"{INTEGRATION}/export/test_prometheus.py",
    "integrations/_langchain_callbacks.py": "tests/borders/test_langchain_callbacks.py",
    "integrations/_langchain_values.py": "tests/borders/test_langchain_cache.py",
    "integrations/langchain.py": "tests/borders/test_langchain_cache.py",
    "integrations/langgraph.py": "tests/borders/test_langgraph.py",
    "integrations/_leases.py": "tests/borders/test_celery.py",
    "integrations/celery.py": "tests/borders/test_celery.py",
    "integrations/rq.py": "tests/borders/test_rq.py",
    "integrations/openai_agents.py": "tests/borders/test_openai_agents.py",
    "integrations/otel.py": "tests/borders/test_otel.py",
    "integrations/_clients.py": "tests/borders/test_django.py",
    "integrations/django.py": "tests/borders/test_django.py",
    "integrations/dogpile.py": "tests/borders/test_dogpile.py",
    "integrations/litellm.py": "tests/borders/test_litellm.py",
    "locks/async_client.py": f"{INTEGRATION}/locks/test_locks.py",
    "locks/client.py": f"{INTEGRATION}/locks/test_locks.py",
    "locks/commands.py": "tests/stateful/locks/test_semaphore.py",
    "locks/flows.py": f"{INTEGRATION}/locks/test_locks.py",
    "locks/keeper.py": f"{INTEGRATION}/locks/test_locks.py",
    "metrics/accumulator.py": "tests/unit/metrics/test_buffer.py",
    "metrics/comparison.py": f"{INTEGRATION}/metrics/test_reading.py",
    "metrics/counters.py": "tests/unit/metrics/test_model.py",
    "metrics/flows.py": f"{INTEGRATION}/metrics/test_reading.py",
    "metrics/flusher.py": f"{INTEGRATION}/metrics/test_faults.py",
    "metrics/recording.py": f"{INTEGRATION}/metrics/test_recording.py",
    "metrics/retention.py": "tests/unit/metrics/test_model.py",
    "metrics/workers.py": f"{INTEGRATION}/metrics/test_workers.py",
    "script.py": "tests/contract/test_headers.py",
    "script_header.py": "tests/contract/test_headers.py",
    "top/app.py": f"{INTEGRATION}/top/test_app.py",
    "top/details.py": f"{INTEGRATION}/top/test_app.py",
    "top/listings.py": f"{INTEGRATION}/top/test_app.py",
    "top/screens.py": f"{INTEGRATION}/top/test_app.py",
    "transport/async_executor.py": f"{INTEGRATION}/transport/test_executor.py",
    "transport/connector.py": f"{INTEGRATION}/transport/test_tls.py",
    "transport/executor.py": f"{INTEGRATION}/transport/test_executor.py",
    "transport/pubsub/bus.py": f"{INTEGRATION}/transport/pubsub/test_bus.py",
    "transport/pubsub/connection.py": f"{INTEGRATION}/transport/pubsub/test_bus.py",
    "transport/pubsub/listener.py": f"{INTEGRATION}/transport/pubsub/test_bus.py",
    "integrations/fastapi.py": "tests/borders/test_fastapi.py",
    "integrations/starlette.py": "tests/borders/test_starlette.py",
    "testing.py": f"{INTEGRATION}/test_testing.py",
    "transport/pubsub/subscriptions.py": f"{INTEGRATION}/transport/pubsub/test_bus.py",
    "transport/resp.py": f"{INTEGRATION}/transport/test_executor.py",
    "views/agents.py": f"{INTEGRATION}/views/test_views.py",
    "views/alerts.py": f"{INTEGRATION}/test_one_moment.py",
    "views/caches.py": f"{INTEGRATION}/test_one_moment.py",
    "views/overview.py": f"{INTEGRATION}/views/test_views.py",
    "views/pools.py": f"{INTEGRATION}/test_one_moment.py",
    "views/reasons.py": f"{INTEGRATION}/cli/test_balancer.py",
    "views/scanning.py": f"{INTEGRATION}/cli/test_namespaces.py",
    "web/actions.py": f"{INTEGRATION}/web/test_actions.py",
    "web/application.py": f"{INTEGRATION}/web/test_mounted.py",
    "web/login.py": "tests/unit/web/test_security.py",
    "web/pages/agents.py": f"{INTEGRATION}/web/test_pages.py",
    "web/pages/alerts.py": f"{INTEGRATION}/web/test_pages.py",
    "web/pages/caches.py": f"{INTEGRATION}/web/test_pages.py",
    "web/pages/memory.py": f"{INTEGRATION}/web/test_pages.py",
    "web/pages/overview.py": f"{INTEGRATION}/web/test_pages.py",
    "web/pages/pools.py": f"{INTEGRATION}/web/test_pages.py",
    "web/pages/rendering.py": f"{INTEGRATION}/web/test_pages.py",
    "web/scrape.py": f"{INTEGRATION}/web/test_numbers.py",
    "web/server.py": f"{INTEGRATION}/cli/test_serve.py",
    "web/templating.py": f"{INTEGRATION}/web/test_mounted.py",
}


def modules() -> list[str]:
    """Return the modules of the package, except modules that only re-export names."""
    found = (str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("**/*.py"))
    return sorted(name for name in found if not name.endswith("__init__.py"))


def unit_tests_of(module: str) -> Iterator[Path]:
    """Yield the possible paths of a module's unit test. The modules of a folder `commands` may share one test."""
    path = Path(module)
    yield TESTS / "unit" / path.parent / f"test_{path.name}"
    if path.parent.name == "commands":
        yield TESTS / "unit" / path.parent.parent / "test_commands.py"


def has_unit_test(module: str) -> bool:
    return any(path.exists() for path in unit_tests_of(module))


def test_modules_have_a_unit_test_or_a_reason() -> None:
    assert [module for module in modules() if not has_unit_test(module) and module not in PROVEN_BY] == []


def test_reasons_name_existing_modules_and_tests() -> None:
    assert [module for module in PROVEN_BY if not (PACKAGE / module).exists()] == []
    assert [module for module in PROVEN_BY if has_unit_test(module)] == [], "these have a unit test and need no reason"
    assert [test for test in PROVEN_BY.values() if not (ROOT / test).exists()] == []


def test_unit_tests_are_named_after_a_module() -> None:
    """A unit test belongs to a module or package of the library, or to a helper module of the tests."""
    stray = []
    for path in (TESTS / "unit").glob("**/test_*.py"):
        module = path.relative_to(TESTS / "unit").with_name(path.name.removeprefix("test_"))
        if not (
            (PACKAGE / module).exists() or (PACKAGE / module).with_suffix("").is_dir() or (TESTS / module).exists()
        ):
            stray.append(str(path))
    assert stray == []


def imported(source: str) -> Iterator[str]:
    """Yield the modules that `source` imports, and the names imported from them. A name may itself be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


_IMPORT_OF_TESTS = re.compile(r"^\s*(?:from|import)\s+tests\b(?:[^(\n]*\([^)]*\)|[^\n]*)", re.MULTILINE)


def from_tests(source: str) -> list[str]:
    """Return the names that `source` imports from a test module or a conftest.

    `source` is parsed only if its import statements contain such a name. Parsing all files would take seconds.
    """
    if not re.search(r"\b(?:conftest|test_)", " ".join(_IMPORT_OF_TESTS.findall(source))):
        return []
    return [
        name
        for name in imported(source)
        if name.startswith("tests.") and any(part == "conftest" or part.startswith("test_") for part in name.split("."))
    ]


def test_no_file_imports_from_a_test() -> None:
    found = {str(path): from_tests(path.read_text(encoding="utf-8")) for path in TESTS.glob("**/*.py")}
    assert {path: names for path, names in found.items() if names} == {}, "shared test code belongs in tests/support"


@pytest.mark.parametrize(
    "source",
    [
        "import tests.unit.test_keys",
        "from tests.unit.test_keys import KEYS",
        "from tests.unit import test_keys",
        "from tests.conftest import Call",
        "from tests import conftest",
        "def f():\n    from tests.integration.cache.test_entries import tag",
    ],
)
def test_import_from_a_test_is_detected(source: str) -> None:
    assert from_tests(source)
