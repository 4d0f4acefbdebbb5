"""The common check that a client rejects an argument."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from agentperf_redis.errors import InvalidArgument


def assert_refused(client: Any, argument: str, method: str, *args: Any, **kwargs: Any) -> None:
    """Check that both APIs of a client reject the argument by name. No server exists, so nothing can have been sent."""

    async def call() -> None:
        result = getattr(client.aio, method)(*args, **kwargs)
        if inspect.isawaitable(result):
            await result

    with pytest.raises(InvalidArgument) as blocking:
        getattr(client, method)(*args, **kwargs)
    with pytest.raises(InvalidArgument) as awaited:
        asyncio.run(call())
    assert blocking.value.argument == awaited.value.argument == argument
