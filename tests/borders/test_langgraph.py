"""Tests of graph metrics and of the node cache for LangGraph, with real graphs and LangGraph's own cache tests."""

from __future__ import annotations

import asyncio
import logging
import operator
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest

from agentperf_redis import AgentPerf, storable
from agentperf_redis.errors import InvalidArgument
from tests.support.places import ROOT
from tests.support.servers import Server, wait_until

pytest.importorskip("langgraph", reason="needs the extra langgraph")

from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import CachePolicy, Command, Overwrite, Send, interrupt

from agentperf_redis.integrations.langchain import AgentPerfCallbackHandler
from agentperf_redis.integrations.langgraph import AgentPerfCache

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey", "cluster")]  # the packages take long to import

UNCHECKED: Any = AgentPerfCache
NOWHERE = "redis://127.0.0.1:1/0"


class State(TypedDict):
    x: int
    log: Annotated[list[Any], operator.add]


class Graphs:
    """Makes graphs with one cached node, and runs them blocking or with asyncio."""

    def __init__(self, cache: Any, runner: asyncio.Runner | None) -> None:
        self.cache, self._runner = cache, runner
        self.calls: list[int] = []

    def make(self, work: Callable[[State], Any] | None = None, ttl: int | None = None, name: str = "node") -> Any:
        def node(state: State) -> Any:
            self.calls.append(state["x"])
            return {"log": [state["x"]]} if work is None else work(state)

        builder = StateGraph(State)
        builder.add_node(name, node, cache_policy=CachePolicy(key_func=lambda state: str(state["x"]), ttl=ttl))
        builder.add_edge(START, name)
        builder.add_edge(name, END)
        return builder.compile(cache=self.cache)

    def run(self, graph: Any, x: int = 1) -> Any:
        return self.method(graph, "invoke", {"x": x, "log": []})["log"]

    def method(self, target: Any, name: str, *args: Any) -> Any:
        """Call a method, or its counterpart for asyncio."""
        if self._runner is None:
            return getattr(target, name)(*args)

        async def call() -> Any:
            return await getattr(target, f"a{name}")(*args)

        return self._runner.run(call())


@pytest.fixture
def cache(perf: AgentPerf) -> Any:
    return AgentPerfCache(perf)


@pytest.fixture(params=["sync", "async"])
def graphs(request: pytest.FixtureRequest, cache: Any, runner: asyncio.Runner) -> Graphs:
    return Graphs(cache, runner if request.param == "async" else None)


def test_cached_node_runs_once_for_each_input(graphs: Graphs) -> None:
    graph = graphs.make()
    assert [graphs.run(graph, x) for x in (1, 2, 1, 2)] == [[1], [2], [1], [2]]
    assert graphs.calls == [1, 2]


def test_other_processes_find_the_writes(server: Server, namespace: str, graphs: Graphs) -> None:
    graphs.run(graphs.make())
    with AgentPerf(server.url, namespace=namespace) as elsewhere:
        other = Graphs(AgentPerfCache(elsewhere), None)
        assert other.run(other.make()) == [1]
        assert other.calls == []


def test_ttl_of_the_policy_is_kept(perf: AgentPerf, graphs: Graphs) -> None:
    graph = graphs.make(ttl=1)
    graphs.run(graph)
    (key,) = perf.cache("langgraph").keys()
    assert (perf.cache("langgraph").ttl(key) or 0) <= 1
    wait_until(lambda: perf.cache("langgraph").ttl(key) is None, "the entry to expire")
    assert graphs.run(graph) == [1]
    assert graphs.calls == [1, 1]


def test_clear_makes_every_node_run_again(graphs: Graphs) -> None:
    graph = graphs.make()
    graphs.run(graph)
    graphs.method(graphs.cache, "clear")
    graphs.run(graph)
    assert graphs.calls == [1, 1]


def test_graph_clears_the_cache_of_its_nodes(graphs: Graphs) -> None:
    one, two = graphs.make(name="one"), graphs.make(name="two")
    for graph in (one, two):
        graphs.run(graph)
    graphs.method(one, "clear_cache", ["one"])
    for graph in (one, two):
        graphs.run(graph)
    assert graphs.calls == [1, 1, 1], "only the node of the first graph runs again"


def test_clear_of_namespaces_clears_exactly_these(graphs: Graphs) -> None:
    namespaces = [(), ("",), ("a",), ("a", "b"), ("a/b",), ("a:b",), ("a" * 300,), ("b",)]
    pairs = {(each, "key"): (index, None) for index, each in enumerate(namespaces)}
    for cleared in namespaces:
        graphs.method(graphs.cache, "set", pairs)
        graphs.method(graphs.cache, "clear", [cleared])
        left = graphs.method(graphs.cache, "get", list(pairs))
        assert left == {key: value for key, (value, _) in pairs.items() if key[0] != cleared}
    graphs.method(graphs.cache, "clear", [])
    assert len(graphs.method(graphs.cache, "get", list(pairs))) == len(pairs) - 1


def test_clear_leaves_other_caches(perf: AgentPerf, graphs: Graphs) -> None:
    other: Any = AgentPerfCache(perf, "others")
    pair = {(("a",), "k"): (1, None)}
    other.set(pair)
    graphs.method(graphs.cache, "set", pair)
    graphs.method(graphs.cache, "clear")
    assert graphs.method(graphs.cache, "get", list(pair)) == {}
    assert other.get(list(pair)) == {(("a",), "k"): 1}


def test_ttl_of_zero_stores_nothing(graphs: Graphs) -> None:
    key = (("a",), "k")
    graphs.method(graphs.cache, "set", {key: ("old", None)})
    graphs.method(graphs.cache, "set", {key: ("new", 0)})
    assert graphs.method(graphs.cache, "get", [key]) == {}
    assert graphs.method(graphs.cache, "get", []) == {}


@storable
@dataclass
class Finding:
    text: str


VALUES: dict[str, Any] = {
    "message": [AIMessage("hi", id="1", usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})],
    "send": [Send("x", {"y": 1}, timeout=2.0)],
    "class of the program": [Finding("x")],
    "tuple, set, None": [(1, 2), {3}, None, b"x", 2**70],
    "overwrite": Overwrite([1, 2]),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_cached_writes_equal_computed_ones(graphs: Graphs, value: Any) -> None:
    graph = graphs.make(lambda _: {"log": value})
    computed, cached = graphs.run(graph), graphs.run(graph)
    assert computed == cached
    assert list(map(type, computed)) == list(map(type, cached))
    assert graphs.calls == [1]


def test_value_that_cannot_be_stored_is_computed_again(graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            raise AssertionError("pickled")

    graph = graphs.make(lambda _: {"log": [Odd()]})
    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        for _ in range(2):
            assert isinstance(graphs.run(graph)[0], Odd)
    assert graphs.calls == [1, 1]
    assert "a value was not stored in the cache 'langgraph'" in caplog.text


def test_serializer_of_langgraph_stores_any_class(perf: AgentPerf, runner: asyncio.Runner) -> None:
    strict = JsonPlusSerializer(allowed_msgpack_modules=[Unregistered])
    for graphs in (Graphs(AgentPerfCache(perf, serde=strict), each) for each in (None, runner)):
        graph = graphs.make(lambda _: {"log": [Unregistered(3)]})
        assert graphs.run(graph) == graphs.run(graph) == [Unregistered(3)]
        perf.cache("langgraph").clear()
        assert graphs.calls == [1]


@dataclass
class Unregistered:
    x: int


def test_values_of_a_serializer_are_apart(perf: AgentPerf, cache: Any) -> None:
    other: Any = AgentPerfCache(perf, serde=JsonPlusSerializer())
    key = (("a",), "k")
    cache.set({key: ("own", None)})
    other.set({key: ("of the serializer", None)})
    assert (cache.get([key]), other.get([key])) == ({key: "own"}, {key: "of the serializer"})


def test_bytes_that_a_serializer_cannot_read_are_a_miss(perf: AgentPerf, caplog: pytest.LogCaptureFixture) -> None:
    cache: Any = AgentPerfCache(perf, serde=JsonPlusSerializer())
    key = (("a",), "k")
    cache.set({key: (1, None)})
    (stored,) = perf.cache("langgraph").keys()
    for damaged in (["pickle", b"x"], ["msgpack", b"\xc1"], 7):
        perf.cache("langgraph").put(stored, damaged)
        assert cache.get([key]) == {}
    assert caplog.text.count("cannot read a value") == 3


def test_value_that_a_serializer_refuses_is_logged(perf: AgentPerf, caplog: pytest.LogCaptureFixture) -> None:
    cache: Any = AgentPerfCache(perf, serde=JsonPlusSerializer())
    cache.set({(("a",), "k"): (object(), None)})
    assert "a value was not stored" in caplog.text


def test_nodes_run_while_the_server_is_away(runner: asyncio.Runner) -> None:
    async def main() -> None:
        async with AgentPerf(NOWHERE, deadline=0.2) as perf:
            graphs = Graphs(AgentPerfCache(perf), None)
            graph = graphs.make()
            assert (await asyncio.to_thread(graph.invoke, {"x": 1, "log": []}))["log"] == [1]
            assert (await graph.ainvoke({"x": 1, "log": []}))["log"] == [1]
            assert graphs.calls == [1, 1]

    runner.run(main())


def test_cached_tasks_of_the_functional_api(graphs: Graphs) -> None:
    calls: list[int] = []

    @task(cache_policy=CachePolicy())
    def double(x: int) -> int:
        calls.append(x)
        return 2 * x

    @entrypoint(cache=graphs.cache)
    def workflow(x: int) -> int:
        return int(double(x).result() + double(x + 1).result())

    assert [graphs.method(workflow, "invoke", 1) for _ in range(2)] == [6, 6]
    assert sorted(calls) == [1, 2]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda perf: UNCHECKED(None),
        lambda perf: UNCHECKED(perf, ""),
        lambda perf: UNCHECKED(perf, max_size="x"),
    ],
)
def test_invalid_argument_is_refused(perf: AgentPerf, misuse: Callable[[AgentPerf], object]) -> None:
    with pytest.raises(InvalidArgument):
        misuse(perf)


# -- metrics


def test_graph_is_an_execution_and_its_nodes_are_spans(perf: AgentPerf, graphs: Graphs) -> None:
    graph = graphs.make(name="plan").with_config(callbacks=[AgentPerfCallbackHandler(perf, "planner")])
    for _ in range(2):
        graphs.run(graph)
    spans = {span.name: span.metrics.task_count for span in perf.metrics.spans("planner").spans}
    assert spans == {"": 2, "plan": 1}, "a node that the cache answers does not run"


def test_name_of_the_graph_is_the_agent(perf: AgentPerf, graphs: Graphs) -> None:
    graph = graphs.make()
    graph.name = "writer"
    graphs.run(graph.with_config(callbacks=[AgentPerfCallbackHandler(perf)]))
    assert perf.metrics.get_or_create_metrics("writer").success_count == 1


def test_interrupts_are_no_failures(perf: AgentPerf, runner: asyncio.Runner) -> None:
    def ask(state: State) -> Any:
        return {"log": [interrupt("go on?")]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    graph = builder.compile(checkpointer=InMemorySaver(), name="asker")
    config: Any = {"configurable": {"thread_id": "1"}, "callbacks": [AgentPerfCallbackHandler(perf)]}
    graph.invoke({"x": 1, "log": []}, config)
    assert runner.run(graph.ainvoke(Command(resume="yes"), config))["log"] == ["yes"]
    found = {span.name: span.metrics for span in perf.metrics.spans("asker").spans}
    assert {name: (each.success_count, each.failure_count) for name, each in found.items()} == {
        "": (2, 0),
        "ask": (2, 0),
    }


def test_agents_made_by_create_agent_are_executions(perf: AgentPerf, runner: asyncio.Runner) -> None:
    agents = pytest.importorskip("langchain.agents", reason="needs the extra borders")
    from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
    from langchain_core.tools import tool

    class Model(GenericFakeChatModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self

    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}

    def call(name: str) -> AIMessage:
        return AIMessage("", usage_metadata=usage, tool_calls=[{"name": name, "args": {"question": "?"}, "id": "c1"}])

    def model(*answers: AIMessage) -> Model:
        return Model(messages=iter(answers * 2))

    last = AIMessage("42", usage_metadata=usage)

    @tool
    def look_up(question: str) -> str:
        """Look it up."""
        return question

    researcher = agents.create_agent(model(call("look_up"), last), [look_up], name="researcher")

    @tool
    async def research(question: str) -> str:
        """Research."""
        found = await researcher.ainvoke({"messages": [("user", question)]})
        return str(found["messages"][-1].content)

    boss = agents.create_agent(model(call("research"), last), [research], name="boss")
    for _ in range(2):
        runner.run(boss.ainvoke({"messages": [("user", "?")]}, {"callbacks": [AgentPerfCallbackHandler(perf)]}))
    found = perf.metrics.snapshots()
    assert set(found) == {"boss", "researcher"}
    for each in found.values():
        assert (each.task_count, each.failure_count) == (2, 0)
        assert (each.llm_calls, each.tokens_in, each.tool_calls) == (4, 40, 2)
    spans = {span.name for span in perf.metrics.spans("boss").spans}
    assert {"model", "tools", "tools/tool:research"} <= spans


# -- LangGraph's own tests of its Redis cache

CONFTEST = '''
"""Gives LangGraph's tests the adapter in the place of its Redis cache, on the server of this session."""
import asyncio, sys, types
import pytest, redis
from agentperf_redis import AgentPerf
from agentperf_redis.integrations import langgraph

URL = {url!r}
opened = []


class Redis(redis.Redis):
    def __init__(self, host="localhost", port=6379, **options):
        if host == "localhost":
            at = redis.connection.parse_url(URL)
            host, port = at["host"], at["port"]
        super().__init__(host=host, port=port, **options)


class RedisCache(langgraph.AgentPerfCache):
    def __init__(self, client, prefix):
        at = client.connection_pool.connection_kwargs
        url = "redis://{{host}}:{{port}}/{{db}}".format(**{{"db": 0, **at}})
        perf = AgentPerf(url, namespace=prefix.strip(":").replace(":", "-"), deadline=1.0)
        opened.append(perf)
        super().__init__(perf)

    def _make_key(self, namespace, key):
        return self._cache._flows.shared.keys.entry(self._name((namespace, key)))


    def get(self, keys):
        found = super().get(keys)
        if any(key == "corrupted_key" for _, key in keys):
            assert self._cache.stats().corrupt == 1, "the test has damaged an entry of this cache"
        return found


redis.Redis = Redis
sys.modules["langgraph.cache.redis"] = types.SimpleNamespace(RedisCache=RedisCache)


@pytest.fixture(autouse=True)
def close():
    yield
    while opened:
        opened.pop().close()


def pytest_collection_modifyitems(items):
    for item in items:
        if asyncio.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.anyio)


@pytest.fixture
def anyio_backend():
    return "asyncio"
'''


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return LangGraph's own file of cache tests, from the source distribution of the installed version."""
    folder = tmp_path_factory.mktemp("langgraph")
    name = f"langgraph-checkpoint=={version('langgraph-checkpoint')}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "langgraph-checkpoint", name]
    ended = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"no package index has {name}: {ended.stderr[-300:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    (found,) = folder.glob("*/tests/test_redis_cache.py")
    return found


@pytest.mark.servers("valkey")
def test_own_tests_of_langgraph_pass(suite: Path, own_server: Server, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(url=own_server.url))
    (tmp_path / "test_redis_cache.py").write_bytes(suite.read_bytes())
    options = ["-q", "-p", "no:asyncio", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "16 passed" in ended.stdout, ended.stdout
