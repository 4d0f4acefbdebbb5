"""Pools of agent instances, shared by all processes."""

from agentperf_redis.balancer.client import AsyncLoadBalancer, LoadBalancer
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import (
    AgentInstance,
    InstanceStatus,
    LeaseStatus,
    LoadBalancingStrategy,
    Outcome,
    PoolLeases,
    PoolStatus,
    Repaired,
    WaiterStatus,
)

__all__ = [
    "AgentInstance",
    "AsyncLoadBalancer",
    "InstanceStatus",
    "Lease",
    "LeaseStatus",
    "LoadBalancer",
    "LoadBalancingStrategy",
    "Outcome",
    "PoolLeases",
    "PoolStatus",
    "Repaired",
    "WaiterStatus",
]
