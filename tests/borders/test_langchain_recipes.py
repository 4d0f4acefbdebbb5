"""The recipes for LangChain and LangGraph run as they stand. A recipe in the README is one of these."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT
from tests.support.recipes import RECIPES
from tests.support.servers import Server

pytest.importorskip("langchain_core", reason="needs the extra langchain")
pytest.importorskip("langgraph", reason="needs the extra langgraph")

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey")]  # the packages are large

LANGCHAIN = """\
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import FakeListChatModel  # instead of ChatOpenAI, ChatAnthropic, ...
from agentperf_redis import AgentPerf
from agentperf_redis.integrations.langchain import AgentPerfCache, AgentPerfCallbackHandler

with AgentPerf() as perf:
    set_llm_cache(AgentPerfCache(perf, default_ttl=3600))
    config = {"callbacks": [AgentPerfCallbackHandler(perf, "planner")]}
    for _ in range(2):  # the second answer comes from the cache
        print(FakeListChatModel(responses=["42"]).invoke("why?", config).content)
    print(perf.metrics.snapshots()["planner"].llm_calls, "call of the model")
"""
LANGGRAPH = """\
from langgraph.graph import StateGraph
from langgraph.types import CachePolicy
from agentperf_redis import AgentPerf
from agentperf_redis.integrations.langgraph import AgentPerfCache

graph = StateGraph(dict)
graph.add_node("search", lambda state: {"found": print("searching") or 1}, cache_policy=CachePolicy(ttl=60))
graph.set_entry_point("search")
with AgentPerf() as perf:
    app = graph.compile(cache=AgentPerfCache(perf))
    print(app.invoke({"query": "a"}), app.invoke({"query": "a"}))  # the node runs once, in all processes
    app.clear_cache()
"""


@pytest.mark.parametrize(
    ("recipe", "printed"),
    [
        (LANGCHAIN, "42\n42\n1 call of the model\n"),
        (LANGGRAPH, "searching\n{'found': 1} {'found': 1}\n"),
    ],
    ids=["langchain", "langgraph"],
)
def test_recipe_runs_as_written(recipe: str, printed: str, server: Server, namespace: str, tmp_path: Path) -> None:
    assert len(list(filter(None, recipe.splitlines()))) <= 12
    done = subprocess.run(
        [sys.executable, "-c", recipe],
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
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def test_recipes_of_the_readme_are_tested() -> None:
    shown = [recipe for recipe in RECIPES if re.search(r"integrations\.lang(chain|graph)", recipe)]
    assert set(shown) <= {LANGCHAIN, LANGGRAPH}
