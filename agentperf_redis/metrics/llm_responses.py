"""Counts a response once: it may come whole, in events of a stream, or again in each later state of a conversation.

The events of one stream may all be recorded, ``record_llm(usage=event)`` for each: the response is one call with its
latest counts. They are told apart by the response's id. An event without one, such as Anthropic's ``message_delta``,
belongs to the last response that began in the same thread or task; so two streams that are read by turns in one task
must not be recorded event by event where the vendor names no id.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace

from agentperf_redis.metrics.llm_usage import SUMMED, Found, Part, Usage, joined

MAX_RESPONSES = 2048
"""Responses that are remembered, the latest: some 300 bytes each. A stream ends, or a conversation comes again, before
this process has begun as many others."""

_Key = tuple[str, str]
_latest: ContextVar[_Key | None] = ContextVar("agentperf_redis.latest_response", default=None)


@dataclass(slots=True)
class _Counted:
    usage: Usage
    unread: bool


class Responses:
    """The responses of a process of which there may be more to come."""

    def __init__(self) -> None:
        self._counted: OrderedDict[_Key, _Counted] = OrderedDict()
        self._lock = threading.RLock()  # a signal handler may record while the thread it interrupts does

    def news(self, agent: str, found: Iterable[Found]) -> tuple[list[Usage], int]:
        """Take in usages.

        Args:
            agent: for whom they are recorded.
            found: the usages.

        Returns:
            What of them was not counted before, and of how many responses so far without counts they are.
        """
        news, first_counts = [], 0
        with self._lock:
            for each in found:
                if each.part is None:
                    news.append(each.usage)
                    continue
                usage, was_unread = self._news_of(agent, each.usage, each.part)
                news.append(usage)
                first_counts += was_unread
        return news, first_counts

    def _news_of(self, agent: str, usage: Usage, part: Part) -> tuple[Usage, bool]:
        key = self._key(agent, part)
        counted = None if key is None else self._counted.get(key)
        if counted is None:
            if key is not None and not part.ends:
                self._remember(key, _Counted(usage, unread=False))
            return usage, False
        if key is not None and part.ends:
            del self._counted[key]
        before, was_unread = counted.usage, counted.unread
        counted.usage, counted.unread = joined(before, usage, adds=part.adds), False
        difference = {name: max(0, getattr(counted.usage, name) - getattr(before, name)) for name in SUMMED}
        return replace(counted.usage, **difference), was_unread

    def event(self, agent: str, part: Part, *, unread: bool) -> bool | None:
        """Take in an event without counts.

        Args:
            agent: for whom it is recorded.
            part: what it is a part of.
            unread: whether its call is counted as one without tokens, until they come.

        Returns:
            Whether its response is known already, and its call counted; None, if it does not say which it is.
        """
        with self._lock:
            key = self._key(agent, part)
            if key is None:
                return None
            if key in self._counted:
                if part.ends:
                    del self._counted[key]
                return True
            if not part.ends:
                self._remember(key, _Counted(Usage(), unread))
            return False

    def _key(self, agent: str, part: Part) -> _Key | None:
        if part.id is not None:
            key: _Key | None = (agent, part.id)
        else:
            key = _latest.get() if part.leads else None
        if part.leads:
            _latest.set(None if part.ends else key)
        return key

    def _remember(self, key: _Key, counted: _Counted) -> None:
        self._counted[key] = counted
        while len(self._counted) > MAX_RESPONSES:
            self._counted.popitem(last=False)
