"""litellm's Router, with mocked completions, shares the capacity of its deployments among all processes."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import email.utils
import gc
import importlib.util
import json
import pickle
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.balancer.model import InstanceState, InstanceStatus, Outcome
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from tests.support.servers import Server, wait_until
from tests.support.workers import Workers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="needs the extra litellm"),
    pytest.mark.thorough,  # the import of litellm takes long
    pytest.mark.filterwarnings("default"),  # a warning raised by litellm must not make a test fail
    pytest.mark.servers("valkey", "cluster"),
]

ASKED = [{"role": "user", "content": "why?"}]
POOL = "litellm:gpt"


def router_of(deployments: dict[str, dict[str, Any]], **options: Any) -> Any:
    """Import litellm. Return a router whose deployments of the model group gpt answer without delay."""
    from litellm.router import Router

    models = [
        {
            "model_name": "gpt",
            "litellm_params": {"model": "openai/gpt-4o", "api_key": "none", "mock_response": "because", **params},
            "model_info": {"id": name},
        }
        for name, params in deployments.items()
    ]
    return Router(model_list=models, **{"num_retries": 0, **options})


def three(**params: Any) -> dict[str, dict[str, Any]]:
    return {name: {"max_parallel_requests": 4, **params} for name in ("d0", "d1", "d2")}


def strategy_of(router: Any, perf: AgentPerf, **options: Any) -> Any:
    from agentperf_redis.integrations.litellm import AgentPerfRoutingStrategy

    return AgentPerfRoutingStrategy(router, perf, **options).install()


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let litellm load nothing from the network."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


@pytest.fixture
def statuses(perf: AgentPerf) -> Callable[[], dict[str, InstanceStatus]]:
    """Return a function that reads the status of each instance."""

    def read() -> dict[str, InstanceStatus]:
        return {each.instance.id: each for pool in perf.balancer().status(POOL) for each in pool.instances}

    return read


@pytest.fixture
def settled(statuses: Callable[[], dict[str, InstanceStatus]], runner: asyncio.Runner) -> Callable[[], None]:
    """Return a function that waits until litellm has reported the end of all calls."""

    def is_idle() -> bool:
        runner.run(asyncio.sleep(0.02))  # let the event loop run: there, litellm reports the end of asyncio calls
        gc.collect()
        return all(each.instance.current_load == 0 for each in statuses().values())

    return lambda: wait_until(is_idle, "all leases to be released")


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Callable[..., Any]:
    """Let a router complete a prompt: `ask(router, mock_response="because")`."""
    if request.param == "async":
        return lambda router, model="gpt", **options: runner.run(router.acompletion(model, ASKED, **options))
    return lambda router, model="gpt", **options: router.completion(model, ASKED, **options)


def test_many_calls_never_exceed_the_capacity_of_a_deployment(
    perf: AgentPerf,
    runner: asyncio.Runner,
    statuses: Callable[[], dict[str, InstanceStatus]],
    settled: Callable[[], None],
) -> None:
    router = router_of(three())
    strategy_of(router, perf, wait=60)

    async def many() -> list[Any]:
        return await asyncio.gather(*(router.acompletion("gpt", ASKED, mock_delay=0.05) for _ in range(48)))

    with ThreadPoolExecutor(24) as threads:
        blocking = [threads.submit(router.completion, "gpt", ASKED, mock_delay=0.05) for _ in range(48)]
        answers = runner.run(many()) + [each.result() for each in blocking]

    assert {answer.choices[0].message.content for answer in answers} == {"because"}
    settled()
    found = statuses()
    assert {name: each.peak_load for name, each in found.items()} == {"d0": 4, "d1": 4, "d2": 4}
    assert sum(each.served for each in found.values()) == 96
    assert all(each.served >= 20 for each in found.values()), "the load is spread"


def too_many(seconds: object) -> Any:
    """Return the error of a deployment that refuses a call."""
    import httpx
    from litellm.exceptions import RateLimitError

    answer = httpx.Response(
        429, headers={"Retry-After": str(seconds)}, request=httpx.Request("POST", "http://localhost")
    )
    return RateLimitError("too many", "openai", "gpt", response=answer)


def served_elsewhere(url: str, namespace: str, resting: Path) -> Generator[str, None, list[tuple[str, float, float]]]:
    """Complete prompts in another process until ten of them began after the file `resting` appeared.

    Returns the deployment, the start and the end of each completion.
    """
    with AgentPerf(url, namespace=namespace) as perf:
        router = router_of(three())
        strategy_of(router, perf, wait=5)
        picked = []
        yield "ready"
        left = 10
        while left:
            left -= resting.exists()
            at = time.time()
            answer = router.completion("gpt", ASKED)
            picked.append((answer._hidden_params["model_id"], at, time.time()))
        return picked


def test_rate_limited_deployment_rests_for_all_processes(
    server: Server,
    namespace: str,
    perf: AgentPerf,
    workers: Workers,
    ask: Callable[..., Any],
    statuses: Any,
    tmp_path: Path,
) -> None:
    from litellm.exceptions import RateLimitError

    others = [workers.start(served_elsewhere, server.url, namespace, tmp_path / "resting") for _ in range(2)]
    router = router_of(three())
    strategy_of(router, perf)
    assert [other.said() for other in others] == ["ready"] * 2
    for other in others:
        other.answer()
    earliest = time.time()
    with pytest.raises(RateLimitError):
        ask(router, mock_response=too_many(30))
    wait_until(lambda: any(each.state is InstanceState.RESTING for each in statuses().values()), "the rest")
    began = time.time()
    (tmp_path / "resting").touch()
    (resting,) = (name for name, each in statuses().items() if each.state is InstanceState.RESTING)

    picked = [each for other in others for each in other.result()]

    during = {name for name, at, ended in picked if at >= began and ended <= earliest + 30}
    assert during == {"d0", "d1", "d2"} - {resting}
    assert ask(router).choices[0].message.content == "because"


def test_router_raises_its_own_error_while_all_deployments_rest(
    perf: AgentPerf, ask: Callable[..., Any], statuses: Any, settled: Callable[[], None]
) -> None:
    router = router_of({"d0": {}})
    strategy_of(router, perf)
    with pytest.raises(Exception, match="too many"):
        ask(router, mock_response=too_many(30))
    wait_until(lambda: statuses()["d0"].state is InstanceState.RESTING, "the rest")
    with pytest.raises(Exception, match="No deployments available") as refused:
        ask(router)
    assert getattr(refused.value, "cooldown_time", None) == pytest.approx(30, abs=15)


def test_each_attempt_of_a_retry_holds_and_reports_its_own_lease(
    perf: AgentPerf, ask: Callable[..., Any], statuses: Any, settled: Callable[[], None]
) -> None:
    from litellm.exceptions import InternalServerError

    router = router_of(three(), num_retries=2, retry_after=0)
    strategy_of(router, perf)
    with pytest.raises(InternalServerError):
        ask(router, mock_response="litellm.InternalServerError")
    settled()
    assert sum(each.failed for each in statuses().values()) == 3
    assert sum(each.served for each in statuses().values()) == 0


def test_cancelled_call_and_unread_stream_leave_no_lease(
    perf: AgentPerf, runner: asyncio.Runner, statuses: Any, settled: Callable[[], None]
) -> None:
    router = router_of(three())
    strategy_of(router, perf)

    async def cut_off() -> None:
        call = asyncio.create_task(router.acompletion("gpt", ASKED, mock_delay=30))
        while not any(each.instance.current_load for each in await asyncio.to_thread(lambda: statuses().values())):
            await asyncio.sleep(0.01)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        stream = await router.acompletion("gpt", ASKED, stream=True)
        async for _ in stream:
            break

    runner.run(cut_off())
    for _ in router.completion("gpt", ASKED, stream=True):
        break
    settled()
    assert sum(each.served + each.failed for each in statuses().values()) == 0, "they say nothing about a deployment"


def test_stream_holds_its_lease_to_its_end(
    perf: AgentPerf, runner: asyncio.Runner, statuses: Any, settled: Callable[[], None]
) -> None:
    router = router_of({"d0": {}})
    strategy_of(router, perf)

    async def read() -> list[int]:
        stream = await router.acompletion("gpt", ASKED, stream=True)
        return [await asyncio.to_thread(lambda: statuses()["d0"].instance.current_load) async for _ in stream]

    assert set(runner.run(read())[:-1]) == {1}
    settled()
    assert statuses()["d0"].served == 1


def test_used_tokens_count_against_the_tokens_per_minute(
    perf: AgentPerf, ask: Callable[..., Any], statuses: Any, settled: Callable[[], None]
) -> None:
    router = router_of({"d0": {"tpm": 100, "rpm": 1000}})
    strategy_of(router, perf)
    assert ask(router).usage.total_tokens == 30
    settled()
    assert statuses()["d0"].state is InstanceState.RATE_LIMITED, "a tenth of 100 tokens may be used at once"
    with pytest.raises(Exception, match="No deployments available"):
        ask(router)


def test_calls_that_share_their_metadata_hold_leases_of_their_own(
    perf: AgentPerf, runner: asyncio.Runner, statuses: Any, settled: Callable[[], None]
) -> None:
    router, metadata = router_of({"d0": {"max_parallel_requests": 2}}), {"tenant": "a"}
    strategy_of(router, perf, wait=30)

    async def many() -> None:
        calls = (router.acompletion("gpt", ASKED, metadata=metadata, mock_delay=0.05) for _ in range(10))
        await asyncio.gather(*calls)

    runner.run(many())
    settled()
    assert "agentperf_lease" not in metadata
    assert (statuses()["d0"].peak_load, statuses()["d0"].served) == (2, 10)


def test_alias_shares_the_pool_and_an_id_takes_no_lease(
    perf: AgentPerf, ask: Callable[..., Any], statuses: Any, settled: Callable[[], None]
) -> None:
    router = router_of({"d0": {}}, model_group_alias={"other": "gpt"})
    strategy_of(router, perf)
    ask(router, "other")
    ask(router, "d0")
    settled()
    assert [pool.agent_type for pool in perf.balancer().status()] == [POOL]
    assert statuses()["d0"].served == 1
    with pytest.raises(Exception, match="no deployment of 'unknown'"):
        ask(router, "unknown")


def test_changed_deployments_change_the_pool(perf: AgentPerf, ask: Callable[..., Any], statuses: Any) -> None:
    from litellm.types.router import Deployment, LiteLLM_Params

    router = router_of({"d0": {"max_parallel_requests": 4, "weight": 3}, "d1": {}}, default_max_parallel_requests=7)
    strategy_of(router, perf)
    ask(router)
    found = statuses()
    assert {name: each.instance.max_capacity for name, each in found.items()} == {"d0": 4, "d1": 7}
    assert {name: each.instance.weight for name, each in found.items()} == {"d0": 3.0, "d1": 1.0}
    params = LiteLLM_Params(model="openai/gpt-4o", api_key="none", mock_response="because", max_parallel_requests=9)
    router.add_deployment(Deployment(model_name="gpt", litellm_params=params, model_info={"id": "d2"}))
    router.delete_deployment(id="d0")
    ask(router)
    assert {name: each.instance.max_capacity for name, each in statuses().items()} == {"d1": 7, "d2": 9}


def test_instances_of_another_process_are_skipped(
    perf: AgentPerf, ask: Callable[..., Any], statuses: Any, settled: Callable[[], None]
) -> None:
    lb = perf.balancer()
    for name in ("newer", "newest"):
        lb.register_instance(AgentInstance(id=name, agent_type=POOL, max_capacity=100))
    router = router_of({"d0": {"max_parallel_requests": 1}})
    strategy_of(router, perf)
    for _ in range(3):
        assert ask(router).choices[0].message.content == "because"
        settled()
    assert {name: each.served for name, each in statuses().items()} == {"d0": 3, "newer": 0, "newest": 0}
    lb.drain(POOL, "d0")
    with pytest.raises(Exception, match="No deployments available"):
        ask(router)
    settled()


def test_pick_without_a_call_takes_no_lease(perf: AgentPerf, runner: asyncio.Runner, statuses: Any) -> None:
    router = router_of(three())
    strategy = strategy_of(router, perf)
    assert strategy.get_available_deployment("gpt")["model_info"]["id"] in three()
    assert runner.run(strategy.async_get_available_deployment("gpt"))["model_info"]["id"] in three()
    assert all(each.peak_load == 0 for each in statuses().values())


@pytest.mark.servers("valkey")
def test_outage_raises_or_takes_any_deployment(
    own_server: Server, namespace: str, ask: Callable[..., Any], runner: asyncio.Runner
) -> None:
    perf = AgentPerf(own_server.url, namespace=namespace, deadline=0.5)
    exact, lenient = router_of(three()), router_of(three())
    strategy_of(exact, perf)
    strategy_of(lenient, perf, on_unavailable="any")
    ask(exact)
    own_server.kill()
    assert ask(lenient).choices[0].message.content == "because"
    with pytest.raises(BackendUnavailable):
        ask(exact)
    runner.run(perf.aclose())


def test_mark_of_a_lease_is_one_text_however_it_is_copied(perf: AgentPerf) -> None:
    from agentperf_redis.integrations.litellm import LEASE

    strategy = strategy_of(router_of(three()), perf)
    request: dict[str, Any] = {"litellm_metadata": {"a": 1}}
    strategy.get_available_deployment("gpt", request_kwargs=request)
    mark = request["litellm_metadata"][LEASE]
    assert copy.deepcopy(request)["litellm_metadata"][LEASE] is copy.copy(mark) is mark
    assert json.loads(json.dumps(request))["litellm_metadata"][LEASE] == mark
    assert type(pickle.loads(pickle.dumps(mark))) is str
    (held,) = perf.balancer().leases(POOL).leases
    assert held.token == mark
    del mark
    request.clear()
    wait_until(lambda: not perf.balancer().leases(POOL).leases, "the lease of a call that is gone")


def test_statuses_of_errors_become_outcomes() -> None:
    from litellm.exceptions import Timeout

    from agentperf_redis.integrations.litellm import outcome_of

    class Failed(Exception):
        def __init__(self, status: int) -> None:
            self.status_code = status

    expected: dict[Outcome, list[Any]] = {
        Outcome.RATE_LIMITED: [Failed(429)],
        Outcome.TIMEOUT: [Failed(408), Failed(504), Timeout("slow", "gpt", "openai")],
        Outcome.ERROR: [Failed(500), Failed(503), Failed(401), Failed(404), ConnectionError(), ValueError()],
        Outcome.NEUTRAL: [Failed(400), Failed(413), Failed(422), asyncio.CancelledError(), KeyboardInterrupt(), None],
    }
    found = {outcome: [outcome_of(error) for error in errors] for outcome, errors in expected.items()}
    assert found == {outcome: [outcome] * len(errors) for outcome, errors in expected.items()}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2"}, 2.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "1e9"}, 86_400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_from_the_headers(headers: dict[str, str], seconds: float | None) -> None:
    from agentperf_redis.integrations.litellm import retry_after

    class Failed(Exception):
        litellm_response_headers = headers

    assert retry_after(Failed()) == seconds


def test_retry_after_may_be_a_date() -> None:
    from agentperf_redis.integrations.litellm import retry_after

    failed = Exception()
    failed.headers = {"Retry-After": email.utils.formatdate(time.time() + 600, usegmt=True)}  # type: ignore[attr-defined]
    assert retry_after(failed) == pytest.approx(600, abs=60)
    assert retry_after(None) is None


@pytest.mark.parametrize(
    "option", [{"wait": -1}, {"prefix": ""}, {"on_unavailable": "none"}, {"strategy": "best"}, {"expected_tokens": -1}]
)
def test_invalid_arguments_are_refused(perf: AgentPerf, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        strategy_of(object(), perf, **option)
    with pytest.raises(InvalidArgument, match="an AgentPerf"):
        strategy_of(object(), perf.backend)  # type: ignore[arg-type]
