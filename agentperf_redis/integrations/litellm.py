"""A routing strategy for litellm's Router: all processes share the capacity of the deployments.

``AgentPerfRoutingStrategy(router, perf).install()``

Each pick leases one unit of a deployment's capacity. The end of the call releases the lease and reports the call's
outcome and tokens. After an answer with the status 429, no process picks the deployment until the time that this answer
names. `agentperf lb status` shows the pools.

litellm does not report the end of a call if the call is cancelled, its stream is not read to the end, or its event loop
has ended. The lease of such a call is released when the call's metadata is garbage-collected, without an outcome and
tokens. The leases of a killed process end after `ttl`.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import random
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Literal, get_args

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.backend import Backend
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.flows.acquiring import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S
from agentperf_redis.balancer.flows.queue import queues_of
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.lease_keeper import lease_keeper_of
from agentperf_redis.balancer.model import MAX_REST_S, AgentInstance, LoadBalancingStrategy, Outcome
from agentperf_redis.balancer.operations import NO_WAIT, Operations, checked_settings
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument, NoCapacity
from agentperf_redis.extras import extra

with extra("litellm"):
    import litellm
    from litellm.exceptions import BadRequestError, Timeout
    from litellm.integrations.custom_logger import CustomLogger
    from litellm.types.router import CustomRoutingStrategyBase, RouterRateLimitError

OnUnavailable = Literal["raise", "any"]

LEASE = "agentperf_lease"
"""The key under which the metadata of a call holds the token of its lease. Loggers of litellm show this token."""
DEFAULT_CAPACITY = 100
_METADATA = ("litellm_metadata", "metadata")
"""The fields in which litellm keeps the metadata of a call. Which one it uses depends on the endpoint."""
_MAX_FOREIGN = 8
"""A pick gives up after this many leases in a row on instances that are not among the deployments of this router."""


class _Mark(str):
    """The token of a lease, in the metadata of the call that holds the lease.

    If litellm does not report the end of the call, this object releases the lease when it is garbage-collected together
    with the metadata.
    """

    __slots__ = ("__weakref__", "strategy")

    strategy: AgentPerfRoutingStrategy

    def __copy__(self) -> _Mark:
        """Return the mark itself: litellm's loggers copy the metadata, and a copy would release the lease early."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> _Mark:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit, many objects are already gone
            self.strategy.abandon(str(self))


class AgentPerfRoutingStrategy(CustomRoutingStrategyBase):  # type: ignore[misc,unused-ignore]
    """Picks the deployment for each call of a Router. All processes share the capacity of each deployment.

    Each model group has a pool, whose name is `prefix` plus the name of the group. Each deployment is an instance of
    the pool, with its `model_info.id` as the id of the instance. These values of `litellm_params` apply:
    `max_parallel_requests` is the capacity, by default the router's `default_max_parallel_requests`, else 100. `rpm`
    and `tpm` are the max requests and tokens per minute. `weight` is used by the strategy "weighted". Processes with
    the same deployments and ids share their leases, rates, rests and health.

    The router's own cool-downs and filters of deployments do not apply to a custom strategy. Instead, the health of the
    pool's instances applies: see `PoolSettings`. A call that names a deployment by its id instead of a model group
    takes no lease.

    Args:
        router: the router.
        perf: the server and namespace.
        strategy: how a pool picks a deployment; see `LoadBalancer`. None: the pool's current
            strategy, which is "least_loaded" in a new pool.
        settings: the settings of the pools; None keeps those of existing pools.
        prefix: the start of the names of the pools.
        wait: max seconds for which a call waits for free capacity. Waiting calls get capacity in the order of arrival.
            A call that gets none raises litellm's RouterRateLimitError, so the router's retries and fallbacks apply.
        expected_tokens: number of tokens that a pick counts against the tokens per minute. At the end of the call, the
            actual number replaces it.
        ttl: seconds after which a killed process's lease ends.
        max_hold: seconds after which a call's lease ends in any case; math.inf for no limit.
        on_unavailable: what a pick does while the server is unreachable. "raise": it raises BackendUnavailable. "any":
            it takes any deployment, without a lease.

    Raises:
        InvalidArgument: an argument is invalid.
    """

    def __init__(
        self,
        router: Any,
        perf: AgentPerf,
        *,
        strategy: LoadBalancingStrategy | str | None = None,
        settings: PoolSettings | None = None,
        prefix: str = "litellm:",
        wait: float = NO_WAIT,
        expected_tokens: int = 0,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_unavailable: OnUnavailable = "raise",
    ) -> None:
        checked_perf(perf)
        if on_unavailable not in get_args(OnUnavailable):
            raise InvalidArgument("on_unavailable", on_unavailable, '"raise" or "any"')
        self._router = router
        self._prefix = arguments.name("prefix", prefix)
        self._on_unavailable = on_unavailable
        self._backend = perf.backend
        self._operations = Operations(
            self._backend,
            lease_keeper_of(self._backend),
            queues_of(self._backend),
            LoadBalancer.check_strategy(strategy),
            checked_settings(settings),
            "raise",
        )
        self._request = self._operations.request(wait, 0, (), None, ttl, max_hold, None, expected_tokens, ())
        self._registered: dict[str, dict[str, tuple[Any, ...]]] = {}
        self._leases: dict[str, Lease] = {}

    def install(self) -> AgentPerfRoutingStrategy:
        """Make the router use this strategy, and make litellm report to it when a call ends. Returns the strategy."""
        self._router.register_plugin(self)
        if _ENDS not in litellm.callbacks:
            litellm.callbacks.append(_ENDS)
        return self

    def get_available_deployment(
        self,
        model: str,
        messages: Any = None,  # noqa: ARG002  litellm's signature
        input: Any = None,  # noqa: A002, ARG002
        specific_deployment: bool | None = False,  # noqa: ARG002
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Lease a deployment of a model group for a call. Called by the router."""
        try:
            return self._backend.run(self._pick(model, request_kwargs))
        except BackendUnavailable as error:
            return self._any(model, error)

    async def async_get_available_deployment(
        self,
        model: str,
        messages: Any = None,  # noqa: ARG002
        input: Any = None,  # noqa: A002, ARG002
        specific_deployment: bool | None = False,  # noqa: ARG002
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See `get_available_deployment`."""
        try:
            return await self._backend.arun(self._pick(model, request_kwargs))
        except BackendUnavailable as error:
            return self._any(model, error)

    @property
    def backend(self) -> Backend:
        """The server and namespace."""
        return self._backend

    def ended(
        self, token: str, outcome: Outcome, took: float | None, tokens: int | None, rest: float | None
    ) -> Flow[None]:
        """Release the lease of a call. Does nothing if it was released before.

        Args:
            token: identifies the lease.
            outcome: the result of the call.
            took: seconds that the call took; None if unknown.
            tokens: tokens that the call used; None if unknown.
            rest: seconds for which no process picks the deployment, if an answer with the status 429 names them;
                otherwise None.
        """
        lease = self._leases.pop(token, None)
        if lease is not None:
            yield from self._operations.release(lease, outcome, took, tokens, rest)

    def abandon(self, token: str) -> None:
        """Release, in the background, the lease of a call whose end was not reported. Called from `__del__`."""
        lease = self._leases.pop(token, None)
        if lease is not None and lease.held:
            self._operations.keeper.jobs.put(partial(_release_abandoned, self._operations, lease))

    def _pick(self, model: str, request: dict[str, Any] | None) -> Flow[Any]:
        registry = self._router.registry()
        deployments = {each["model_info"]["id"]: each for each in registry.deployments(model) or ()}
        if not deployments:
            named = registry.deployment_dict(model) if registry.has_deployment(model) else None
            if named is None:
                raise BadRequestError(f"the router has no deployment of {model!r}", model=model, llm_provider="")
            return named
        # If `model` is an alias, the deployments found above have the alias as their `model_name`. The router's stored
        # deployments have the name of the group instead.
        stored = registry.deployment_dict(next(iter(deployments)))
        pool = f"{self._prefix}{(stored or {}).get('model_name', model)}"
        yield from self._register(pool, deployments)
        if request is None:  # no call follows, so nothing would release a lease
            seen = yield from self._operations.select(pool, (), None)
            return deployments.get("" if seen is None else seen.id) or next(iter(deployments.values()))
        foreign: list[Lease] = []
        try:
            while True:
                lease = yield from self._operations.enter(self._operations.pool(pool), self._request)
                if lease.instance_id in deployments:
                    break
                foreign.append(lease)  # for example, only another process has the deployment of this lease
                if len(foreign) == _MAX_FOREIGN:
                    raise NoCapacity(pool, "its instances are deployments that this router does not have", 1.0)
        except NoCapacity as full:
            raise RouterRateLimitError(
                model=model, cooldown_time=full.retry_after, enable_pre_call_checks=False, cooldown_list=[]
            ) from full
        finally:
            for each in foreign:
                yield from self._operations.release(each, Outcome.NEUTRAL, None, None, None)
        place = next((name for name in _METADATA if name in request), "metadata")
        # Several calls may share the caller's metadata dict. So leave this dict unchanged; put the mark into a copy.
        mark = _Mark(lease.token)
        mark.strategy, self._leases[lease.token] = self, lease
        request[place] = {**(request.get(place) or {}), LEASE: mark}
        return deployments[lease.instance_id]

    def _register(self, pool: str, deployments: Mapping[str, Any]) -> Flow[None]:
        """Register new and changed deployments of a group, and remove those that this router no longer has."""
        default = self._router.settings().default_max_parallel_requests or DEFAULT_CAPACITY
        wanted = {name: _facts(each["litellm_params"], default) for name, each in deployments.items()}
        known = self._registered.setdefault(pool, {})
        for name, facts in wanted.items():
            if known.get(name) != facts:
                capacity, rpm, tpm, weight = facts
                instance = AgentInstance(id=name, agent_type=pool, max_capacity=capacity, weight=weight)
                yield from self._operations.register(instance, None, rpm, tpm)
                known[name] = facts
        for name in known.keys() - wanted.keys():
            # The router may find some deployments of the group only by another model name, such as a wildcard. Those
            # deployments are missing from `deployments`. So remove a deployment only if the router lacks its id.
            if not self._router.registry().has_deployment(name):
                yield from self._operations.remove(pool, name)
                known.pop(name, None)

    def _any(self, model: str, error: BackendUnavailable) -> Any:
        """Return any deployment, since the server is unreachable, or raise the error if none may be used."""
        deployments = list(self._router.registry().deployments(model) or ())
        if self._on_unavailable == "raise" or not deployments:
            raise error
        self._backend.log_absence(error)
        return random.choice(deployments)


class _EndsOfCalls(CustomLogger):  # type: ignore[misc,unused-ignore]
    """Reports the end of each call to the strategy that leased the deployment for the call.

    litellm has one list of callbacks for the whole process, so all strategies share this callback. The list therefore
    refers to no strategy. So a strategy that is no longer used is not called, and can be garbage-collected.
    """

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        mark = _mark_in(kwargs)
        if mark is not None:
            with contextlib.suppress(AgentPerfError):  # the release is retried in the background
                mark.strategy.backend.run(_succeeded(mark, response_obj, start_time, end_time))

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        mark = _mark_in(kwargs)
        if mark is not None:
            with contextlib.suppress(AgentPerfError):
                await mark.strategy.backend.arun(_succeeded(mark, response_obj, start_time, end_time))

    def log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:  # noqa: ARG002
        mark = _mark_in(kwargs)
        if mark is not None:
            with contextlib.suppress(AgentPerfError):
                mark.strategy.backend.run(_failed(mark, kwargs, start_time, end_time))

    async def async_log_failure_event(
        self,
        kwargs: Any,
        response_obj: Any,  # noqa: ARG002
        start_time: Any,
        end_time: Any,
    ) -> None:
        mark = _mark_in(kwargs)
        if mark is not None:
            with contextlib.suppress(AgentPerfError):
                await mark.strategy.backend.arun(_failed(mark, kwargs, start_time, end_time))


_ENDS = _EndsOfCalls()


def _mark_in(kwargs: Any) -> _Mark | None:
    """Return the mark of a call; None if the call holds no lease."""
    params = kwargs.get("litellm_params") or {}
    marks = ((params.get(place) or {}).get(LEASE) for place in _METADATA)
    return next((each for each in marks if isinstance(each, _Mark)), None)


def _succeeded(mark: _Mark, response: Any, start: Any, end: Any) -> Flow[None]:
    used = getattr(getattr(response, "usage", None), "total_tokens", None)
    tokens = used if isinstance(used, int) and used >= 0 else None
    return mark.strategy.ended(mark, Outcome.OK, _seconds(start, end), tokens, None)


def _failed(mark: _Mark, kwargs: Any, start: Any, end: Any) -> Flow[None]:
    error = kwargs.get("exception")
    outcome = outcome_of(error)
    rest = retry_after(error) if outcome is Outcome.RATE_LIMITED else None
    return mark.strategy.ended(mark, outcome, _seconds(start, end), 0, rest)


def outcome_of(error: object) -> Outcome:
    """Return the outcome of a call that raised an error of litellm.

    A fault of the request, such as a prompt that is too long, says nothing about the deployment. A wrong key or model
    name is a fault of the deployment.
    """
    status = getattr(error, "status_code", None)
    if error is None or isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
        return Outcome.NEUTRAL
    if status == 429:  # noqa: PLR2004  HTTP statuses are known by their numbers
        return Outcome.RATE_LIMITED
    if isinstance(error, Timeout) or status in (408, 504):
        return Outcome.TIMEOUT
    if status in (401, 403, 404) or not isinstance(status, int) or status >= 500:  # noqa: PLR2004
        return Outcome.ERROR
    return Outcome.NEUTRAL


def retry_after(error: object) -> float | None:
    """Return the seconds from the header `retry-after-ms` or `Retry-After` of an answer; None if it has neither."""
    for headers in (
        getattr(error, "litellm_response_headers", None),
        getattr(getattr(error, "response", None), "headers", None),
        getattr(error, "headers", None),
    ):
        if not isinstance(headers, Mapping):
            continue
        for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
            named = {str(name).lower(): value for name, value in headers.items()}.get(header)
            seconds = None if named is None else _as_seconds(str(named), unit)
            if seconds is not None:
                return min(max(0.0, seconds), MAX_REST_S)
    return None


def _as_seconds(text: str, unit: float) -> float | None:
    with contextlib.suppress(ValueError):
        seconds = float(text) * unit
        return seconds if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError):
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return None


def _facts(params: Mapping[str, Any], default_capacity: int) -> tuple[int, float, float, float]:
    """Return the capacity, the rates per minute and the weight of a deployment."""
    capacity, rpm, tpm, weight = (params.get(name) for name in ("max_parallel_requests", "rpm", "tpm", "weight"))
    return (
        capacity or default_capacity,
        math.inf if rpm is None else rpm,
        math.inf if tpm is None else tpm,
        1.0 if weight is None else weight,
    )


def _seconds(start: Any, end: Any) -> float | None:
    """Return the seconds between two times that litellm reports; None if the values are not times."""
    with contextlib.suppress(TypeError):
        took = end - start
        seconds = took.total_seconds() if isinstance(took, timedelta) else float(took)
        return max(0.0, seconds)
    return None


def _release_abandoned(operations: Operations, lease: Lease) -> None:
    """Release the lease of a call whose end was not reported. Runs on the background thread."""
    with contextlib.suppress(AgentPerfError):
        operations.backend.run(operations.release(lease, Outcome.NEUTRAL, None, None, None))
