"""Pools of agent instances, shared by all processes."""

from agentperf_redis.balancer.client import AsyncLoadBalancer, LoadBalancer
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import (
    AgentInstance,
    InstanceStatus,
    LoadBalancingStrategy,
    Outcome,
    PoolStatus,
)

__all__ = [
    "AgentInstance",
    "AsyncLoadBalancer",
    "InstanceStatus",
    "Lease",
    "LoadBalancer",
    "LoadBalancingStrategy",
    "Outcome",
    "PoolStatus",
]
