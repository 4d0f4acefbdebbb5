"""Commands that read or repair a pool page by page: its instances, leases and waiters."""

from __future__ import annotations

from dataclasses import dataclass

from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.records import holder, instance_status
from agentperf_redis.balancer.commands.replies import Status, opened, refusal, settings_of, strategy_of
from agentperf_redis.balancer.model import InstanceStatus, LeaseStatus, LoadBalancingStrategy, WaiterStatus
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Command, Reply
from agentperf_redis.script import Script

LEASES = Script("balancer/leases")
REPAIR = Script("balancer/repair")
STATUS = Script("balancer/status")


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a pool's instances; status.lua describes the fields."""

    strategy: LoadBalancingStrategy
    instances: tuple[InstanceStatus, ...]
    waiting: int
    overdue: int
    granted: int
    next_rank: int
    panic_for: float | None
    settings: PoolSettings | None


@dataclass(frozen=True, slots=True)
class LeasesPage:
    """One page of leases and waiters; leases.lua describes the fields."""

    leases: tuple[LeaseStatus, ...]
    waiters: tuple[WaiterStatus, ...]
    next_rank: int


@dataclass(frozen=True, slots=True)
class RepairedPage:
    """The result of one page of a repair; repair.lua describes the fields."""

    wrong: int
    orphans: int
    registered: int
    next_rank: int


def status(pool: Pool, first: int, count: int) -> Command[Page | None]:
    """Read one page of instances, starting at rank `first`. Returns None when there is no such pool."""

    def decode(reply: Reply) -> Page | None:
        match opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case (
                Status.DONE,
                [
                    bytes() as strategy,
                    int(),
                    int() as waiting,
                    int() as overdue,
                    int() as granted,
                    int() as rank,
                    int() as now_ms,
                    int() as panic_ms,
                    bytes() as packed,
                    *rest,
                ],
            ):
                found = zip(rest[::3], rest[1::3], rest[2::3], strict=False)
                return Page(
                    strategy_of(pool, strategy),
                    tuple(instance_status(pool, now_ms, *each) for each in found),
                    waiting,
                    overdue,
                    granted,
                    rank,
                    max(0.0, (now_ms - panic_ms) / 1000) if panic_ms else None,
                    settings_of(pool, packed),
                )
            case code, values:
                raise refusal(pool, code, values)

    return Command(STATUS, (*pool.keys.core, pool.keys.ids), {"first": first, "count": count}, decode)


def leases_page(pool: Pool, first: int, count: int) -> Command[LeasesPage | None]:
    """Read one page of leases and waiters. Returns None when there is no such pool."""

    def decode(reply: Reply) -> LeasesPage | None:
        match opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [int() as now_ms, int() as next_rank, *rest]:
                found = [holder(pool, now_ms, *entry) for entry in zip(rest[::3], rest[1::3], rest[2::3], strict=False)]
                return LeasesPage(
                    tuple(entry for entry in found if isinstance(entry, LeaseStatus)),
                    tuple(entry for entry in found if isinstance(entry, WaiterStatus)),
                    next_rank,
                )
            case code, values:
                raise refusal(pool, code, values)

    return Command(LEASES, (pool.keys.state, pool.keys.due), {"first": first, "count": count}, decode)


def repair(pool: Pool, first: int, count: int) -> Command[RepairedPage | None]:
    """Recompute the load of one page of instances. Returns None when there is no such pool."""

    def decode(reply: Reply) -> RepairedPage | None:
        match opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [int() as next_rank, int() as wrong, int() as orphans, int() as registered]:
                return RepairedPage(wrong, orphans, registered, next_rank)
            case code, values:
                raise refusal(pool, code, values)

    return Command(REPAIR, (*pool.keys.core, pool.keys.ids), {"first": first, "count": count}, decode)
