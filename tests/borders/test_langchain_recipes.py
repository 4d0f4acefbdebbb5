"""The README's recipes for LangChain and LangGraph work, also across processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentperf_redis import AgentPerf
from tests.support.places import ROOT
from tests.support.recipes import recipe
from tests.support.servers import Server

pytest.importorskip("langchain_core", reason="needs the extra langchain")
pytest.importorskip("langgraph", reason="needs the extra langgraph")

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey")]  # the packages take long to import

LANGCHAIN_CALL = """
from langchain_core.language_models import FakeListChatModel
print(FakeListChatModel(responses=["42"]).invoke("why?", config).content)
perf.close()
"""
LANGGRAPH_CALL = """
print(app.invoke({"query": "a"}), app.invoke({"query": "a"}))
"""


def run(program: str, server: Server, namespace: str, tmp_path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "AGENTPERF_REDIS_URL": server.url,
            "AGENTPERF_NAMESPACE": namespace,
            "PYTHONPATH": str(ROOT),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_langchain_recipe_calls_the_model_once(perf: AgentPerf, server: Server, namespace: str, tmp_path: Path) -> None:
    for _ in range(2):  # the second process gets the response that the first process cached
        assert run(recipe("langchain") + LANGCHAIN_CALL, server, namespace, tmp_path) == "42\n"
    found = perf.metrics.snapshots()["planner"]
    assert (found.success_count, found.llm_calls) == (2, 1)


def test_langgraph_recipe_runs_the_node_once(perf: AgentPerf, server: Server, namespace: str, tmp_path: Path) -> None:
    for _ in range(2):
        output = run(recipe("langgraph") + LANGGRAPH_CALL, server, namespace, tmp_path)
        assert output == "{'found': 'a'} {'found': 'a'}\n"
    (cache,) = perf.caches()
    assert (cache.hits, cache.misses, cache.size) == (3, 1, 1)
