"""Checks a demo's promises against the journals of the workers and the state of the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentperf_redis.balancer.model import PoolStatus
from agentperf_redis.demo.journal import Account
from agentperf_redis.demo.report import Casualty, Check

MAX_TIMES_COMPUTED = 1.05
"""Maximum number of times that each computation may be done on average.

It is more than 1, because the computation that the killed worker was running must be repeated.
"""
UNFLUSHED_S = 3.0
"""Steps in these last seconds of the killed worker may be missing from the metrics.

Metrics are flushed every second; on a loaded machine a flush may take longer.
"""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts that the checks use.

    Attributes:
        accounts: journals of all workers.
        failed: exit code and last log lines of each worker that failed.
        victim: journal of the worker chosen to be killed; None if none was chosen.
        killed_at: time at which the victim was stopped for the kill, s by the monotonic clock; None if it was not
            killed.
        casualty: the killed worker; None if none was killed.
        left: agent type of each lease that still exists at the end.
        pools: all pools, read before the leases for `regained` were taken.
        regained: number of leases that could be held at the same time in each pool at the end.
        granted: number of leases that the scripts counted as granted during the demo, for each pool.
        tried: how many of `granted` were taken only to test whether the dead worker's capacity was free again.
        recorded: number of executions recorded for each agent during the demo.
        calls: number of model calls recorded for each agent during the demo; None if the demo records none.
    """

    accounts: Sequence[Account]
    failed: Sequence[str]
    victim: Account | None
    killed_at: float | None
    casualty: Casualty | None
    left: Sequence[str]
    pools: Sequence[PoolStatus]
    regained: Mapping[str, int]
    granted: Mapping[str, int]
    tried: Mapping[str, int]
    recorded: Mapping[str, int]
    calls: Mapping[str, int] | None = None

    @property
    def computed(self) -> int:
        """Number of computations that the workers began, including those of the killed worker."""
        return sum(account.began.total() for account in self.accounts)

    @property
    def distinct(self) -> int:
        """Number of distinct computations among `computed`."""
        return len(set().union(*(account.began for account in self.accounts)))

    @property
    def served(self) -> int:
        """Number of times that a worker used a result and did not compute it."""
        return max(0, sum(account.used.total() for account in self.accounts) - self.computed)


def checks(evidence: Evidence) -> tuple[Check, ...]:
    """Check the promises of a demo.

    Args:
        evidence: the facts about the demo.

    Returns:
        Every promise with its result.
    """
    killing = (_victim_held_leases(evidence), _capacity_came_back(evidence)) if evidence.victim is not None else ()
    return (
        _all_through(evidence),
        _same_report(evidence),
        _computed_once(evidence),
        *killing,
        _never_over_capacity(evidence),
        _nothing_left(evidence),
        _leases_balance(evidence),
        _metrics_balance(evidence),
        *((_calls_balance(evidence, evidence.calls),) if evidence.calls is not None else ()),
    )


def _all_through(evidence: Evidence) -> Check:
    through = sum(account.result is not None for account in evidence.accounts)
    expected = len(evidence.accounts) - (evidence.killed_at is not None)
    figures = "; ".join(evidence.failed) or f"{through} of {expected}"
    return Check(
        "every worker that was not killed finished its job", through == expected and not evidence.failed, figures
    )


def _same_report(evidence: Evidence) -> Check:
    digests = Counter(account.result["digest"] for account in evidence.accounts if account.result is not None)
    shown = ", ".join(f"{digest[:12]} from {count}" for digest, count in digests.most_common()) or "no report at all"
    return Check("every worker's report is the same", len(digests) == 1, shown)


def _computed_once(evidence: Evidence) -> Check:
    times = evidence.computed / max(1, evidence.distinct)
    by_key = Counter[str]()
    for account in evidence.accounts:
        by_key.update(account.began)
    maximum, count = max(by_key.items(), key=lambda item: item[1], default=("", 0))
    figures = (
        f"{evidence.distinct} distinct computations were done {times:.3f} times on average, {evidence.served} results "
        f"came from a cache" + (f"; {maximum} was computed {count} times" if count > 1 else "")
    )
    promise = f"each computation was done at most {MAX_TIMES_COMPUTED} times on average"
    if not evidence.computed:
        return Check(promise, False, "nothing was computed: all results came from an earlier demo")
    return Check(promise, times <= MAX_TIMES_COMPUTED, figures)


def _victim_held_leases(evidence: Evidence) -> Check:
    promise = "one worker was killed while it held a lease"
    if evidence.casualty is None:
        return Check(promise, False, "it finished before it was stopped with a lease")
    held = evidence.casualty.leases
    return Check(promise, len(held) >= 1, f"worker {evidence.casualty.number} held {len(held)}: {', '.join(held)}")


def _capacity_came_back(evidence: Evidence) -> Check:
    after = evidence.casualty.recovered_after if evidence.casualty is not None else None
    total = sum(pool.total_capacity for pool in evidence.pools)
    regained = sum(evidence.regained.values())
    when = f"after {after:.1f} s" if after is not None else "never"
    figures = f"its leases were gone {when}; in the end {regained} of {total} units could be leased at once"
    return Check("its capacity came back", after is not None and regained == total, figures)


def _never_over_capacity(evidence: Evidence) -> Check:
    over = [
        f"{status.instance.id} had {status.peak_load} of {status.instance.max_capacity}"
        for pool in evidence.pools
        for status in pool.instances
        if status.peak_load > status.instance.max_capacity
    ]
    peaks = ", ".join(
        f"{pool.agent_type} {sum(status.peak_load for status in pool.instances)}/{pool.total_capacity}"
        for pool in evidence.pools
    )
    return Check("no instance ever had more leases than capacity", not over, "; ".join(over) or f"peaks: {peaks}")


def _nothing_left(evidence: Evidence) -> Check:
    left = ", ".join(f"{count} of {agent}" for agent, count in sorted(Counter(evidence.left).items()))
    loads = sum(pool.current_load for pool in evidence.pools)
    return Check(
        "no lease is left", not evidence.left and loads == 0, left or f"none, and the load of all instances is {loads}"
    )


def _leases_balance(evidence: Evidence) -> Check:
    """Check that every granted lease ran one step, except the leases that the killed worker held."""
    steps = _steps(evidence)
    unfinished = Counter(evidence.casualty.leases if evidence.casualty is not None else ())
    wrong, granted = [], 0
    for agent, count in evidence.granted.items():
        for_steps = count - evidence.tried.get(agent, 0)
        granted += for_steps
        if not steps[agent] <= for_steps <= steps[agent] + unfinished[agent]:
            wrong.append(f"{agent}: {for_steps} leases for {steps[agent]} steps")
    figures = "; ".join(wrong) or f"{granted} leases granted, {steps.total()} steps done"
    return Check("leases granted and steps done balance", not wrong and granted > 0, figures)


def _metrics_balance(evidence: Evidence) -> Check:
    """Check that every step was recorded, except the steps that the killed worker had not flushed."""
    steps, unflushed = _steps(evidence), Counter[str]()
    if evidence.victim is not None and evidence.killed_at is not None:
        since = evidence.killed_at - UNFLUSHED_S
        unflushed.update(agent for when, agent in evidence.victim.steps if when >= since)
    wrong = [
        f"{agent}: {evidence.recorded.get(agent, 0)} recorded of {count}"
        for agent, count in sorted(steps.items())
        if not count - unflushed[agent] <= evidence.recorded.get(agent, 0) <= count
    ]
    recorded = sum(evidence.recorded.get(agent, 0) for agent in steps)
    lost = steps.total() - recorded
    figures = "; ".join(wrong) or f"{recorded} of {steps.total()} recorded" + (
        f", {lost} lost with the killed worker, which had done {unflushed.total()} in its last {UNFLUSHED_S:g} s"
        if lost
        else ""
    )
    return Check(
        "every step is in the metrics, except what the killed worker had not sent", not wrong and bool(steps), figures
    )


def _calls_balance(evidence: Evidence, calls: Mapping[str, int]) -> Check:
    """Check that every recorded step has a model call. A kill may separate the two records of one step."""
    cut = 0 if evidence.killed_at is None else 1
    recorded = {agent: evidence.recorded.get(agent, 0) for agent in sorted(_steps(evidence))}
    wrong = [
        f"{agent}: {calls.get(agent, 0)} calls for {count} steps"
        for agent, count in recorded.items()
        if abs(calls.get(agent, 0) - count) > cut
    ]
    total = sum(calls.get(agent, 0) for agent in recorded)
    figures = "; ".join(wrong) or f"{total} calls for {sum(recorded.values())} recorded steps"
    return Check("every recorded step is also recorded as a model call", not wrong and total > 0, figures)


def _steps(evidence: Evidence) -> Counter[str]:
    return Counter(agent for account in evidence.accounts for _, agent in account.steps)
