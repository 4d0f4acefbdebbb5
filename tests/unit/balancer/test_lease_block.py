"""The error of a misused lease block says how to use the block."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.balancer import LoadBalancer


def test_misused_block_names_the_right_form(dead_backend: Backend) -> None:
    balancer: Any = LoadBalancer(backend=dead_backend)
    with pytest.raises(AttributeError, match=r"with lb\.lease\(.*\) as lease"):
        _ = balancer.lease("t").instance
    with pytest.raises(AttributeError, match=r"async with lb\.aio\.lease\(.*\) as lease"):
        _ = balancer.aio.lease("t").instance
    with pytest.raises(TypeError, match=r"async with lb\.aio\.lease"), balancer.aio.lease("t"):
        pass

    async def enter() -> None:
        async with balancer.lease("t"):
            pass

    with pytest.raises(TypeError, match=r"async with lb\.aio\.lease"):
        asyncio.run(enter())
