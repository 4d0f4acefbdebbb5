"""Warns of blocking calls inside a running event loop: such a call stops every task of the loop until it returns."""

from __future__ import annotations

import sys
import warnings
from types import CodeType, FrameType
from typing import Final

_INSTEAD: Final = {
    ("AgentPerf", "caches"): ("perf.caches()", "await perf.acaches()"),
    ("AgentPerf", "close"): ("perf.close()", "await perf.aclose()"),
    ("AgentPerf", "__exit__"): ("with AgentPerf(...)", "async with AgentPerf(...)"),
    ("Backend", "close"): ("backend.close()", "await backend.aclose()"),
    ("LeaseBlock", "__enter__"): ("with lb.lease(...)", "async with lb.aio.lease(...)"),
    ("LeaseBlock", "__exit__"): ("with lb.lease(...)", "async with lb.aio.lease(...)"),
}
"""(class, method) -> the call and its asyncio form, for each call whose asyncio form is not its method under `.aio`."""
_VARIABLES: Final = {"LoadBalancer": "lb", "MetricsCollector": "metrics"}
_MAX_PLACES: Final = 1000
"""Maximum number of places of calls that are remembered. So it is also the maximum number of warnings."""

_places: set[tuple[CodeType, int]] = set()


def warn_of_blocking_call() -> None:
    """Warn, once for each place in the program, that the current call blocks the event loop of this thread."""
    inner: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  the only way to walk up the frames cheaply
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("agentperf_redis."):
            inner = frame
        elif module != "contextlib":  # contextlib is skipped: an ExitStack calls `__enter__` for the program
            break
        frame = frame.f_back
    if frame is None or inner is None or _is_typed_in(frame):
        return
    place = (frame.f_code, frame.f_lineno)
    if place in _places or len(_places) >= _MAX_PLACES:
        return
    _places.add(place)
    warnings.warn_explicit(
        _text(inner),
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_typed_in(frame: FrameType) -> bool:
    """Whether a user has typed the call into a notebook or a prompt. The event loop there waits for the call anyway."""
    code = frame.f_code
    return code.co_name == "<module>" and (code.co_filename.startswith("<") or "ipykernel" in sys.modules)


def _text(inner: FrameType) -> str:
    """Return the warning. The program has called a method of this library; `inner` is the frame of that method."""
    owner, method = inner.f_locals.get("self"), inner.f_code.co_name
    name = type(owner).__name__
    if (name, method) in _INSTEAD:
        call, instead = _INSTEAD[name, method]
    elif hasattr(type(owner), "aio"):
        variable = _VARIABLES.get(name, "cache")
        call = f"{variable}.{method}()"
        found = hasattr(getattr(owner, "aio", None), method)
        instead = f"await {variable}.aio.{method}(...)" if found else f"the methods of {variable}.aio"
    else:
        function = getattr(owner, "function", None)
        call = f"{getattr(function, '__qualname__', method)}()"
        instead = "an `async def` function under the same decorator, or `asyncio.to_thread`"
    quoted = instead if "`" in instead or " of " in instead else f"`{instead}`"
    return f"`{call}` blocks the running event loop and all of its tasks; in a coroutine, use {quoted}"
