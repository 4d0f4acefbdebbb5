"""The load balancer: pools of agent instances, shared by all processes."""

from agentperf_redis.balancer.async_client import AsyncLoadBalancer
from agentperf_redis.balancer.client import LoadBalancer
from agentperf_redis.balancer.health_checks import Checks
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import (
    AgentInstance,
    EventKind,
    InstanceState,
    InstanceStatus,
    LeaseStatus,
    LoadBalancingStrategy,
    Outcome,
    PoolEvent,
    PoolLeases,
    PoolStatus,
    Repaired,
    WaiterStatus,
)
from agentperf_redis.balancer.settings import PoolSettings

__all__ = [
    "AgentInstance",
    "AsyncLoadBalancer",
    "Checks",
    "EventKind",
    "InstanceState",
    "InstanceStatus",
    "Lease",
    "LeaseStatus",
    "LoadBalancer",
    "LoadBalancingStrategy",
    "Outcome",
    "PoolEvent",
    "PoolLeases",
    "PoolSettings",
    "PoolStatus",
    "Repaired",
    "WaiterStatus",
]
