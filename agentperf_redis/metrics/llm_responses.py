"""Counts a response once, whether it comes whole, as events of a stream, or again in later states of a conversation.

A program may call ``record_llm(usage=event)`` for every event of a stream. The response then counts as one call, with
the counts of its latest event. A response is identified by its id. An event without an id, such as Anthropic's
``message_delta``, belongs to the latest response that began in the same thread or task. Therefore, two streams that are
read alternately in one task must not be recorded event by event if the vendor sends no ids.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace

from agentperf_redis.metrics.llm_usage import SUMMED, Found, Part, Usage, joined

MAX_RESPONSES = 2048
"""Maximum number of remembered responses; the latest are kept. Each takes about 300 bytes. A process rarely begins this
many responses before a stream ends or the same conversation is passed again."""

_Key = tuple[str, str]
_latest: ContextVar[_Key | None] = ContextVar("agentperf_redis.latest_response", default=None)


@dataclass(slots=True)
class _Counted:
    usage: Usage
    unread: bool


class Responses:
    """The responses of this process that may still get further parts."""

    def __init__(self) -> None:
        self._counted: OrderedDict[_Key, _Counted] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: a signal handler may record while this thread holds the lock

    def news(self, agent: str, found: Iterable[Found]) -> tuple[list[Usage], int]:
        """Register usages, and return the part of their counts that was not counted before.

        Args:
            agent: the agent.
            found: the usages.

        Returns:
            The part of each usage that was not counted before. Also the number of responses that counted as calls
            without tokens until now.
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
        """Register an event without counts.

        Args:
            agent: the agent.
            part: the part of a response that the event represents.
            unread: whether the call counts as a call without tokens until an event has counts.

        Returns:
            True if the response of the event is known, so that its call is already counted; False if the response is
            new; None if the event does not identify a response.
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
