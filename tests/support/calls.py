"""Calls to a client through its blocking or its asyncio methods."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Call:
    """Calls a method of a client's blocking or asyncio API: `call(lb, "acquire", "planner", wait=0)`.

    Attributes:
        is_async: whether the calls use the asyncio API.
    """

    def __init__(self, runner: asyncio.Runner | None) -> None:
        self._runner = runner
        self.is_async = runner is not None

    def __call__(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._runner is None:
            return getattr(client, method)(*args, **kwargs)
        aio = client.aio

        async def run() -> Any:
            return await getattr(aio, method)(*args, **kwargs)

        return self._runner.run(run())

    @contextlib.contextmanager
    def inside(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Enter the context manager that the method returns: `with call.inside(lb, "lease", "planner") as lease`."""
        if self._runner is None:
            with getattr(client, method)(*args, **kwargs) as entered:
                yield entered
            return
        manager = getattr(client.aio, method)(*args, **kwargs)

        async def enter() -> Any:
            return await manager.__aenter__()

        async def leave(*error: Any) -> bool | None:
            left: bool | None = await manager.__aexit__(*error)
            return left

        entered = self._runner.run(enter())
        try:
            yield entered
        except BaseException:
            if not self._runner.run(leave(*sys.exc_info())):
                raise
        else:
            self._runner.run(leave(None, None, None))
