"""Making entries a miss: by key, by tag, all; and clearing away what is left of them."""

from __future__ import annotations

from collections.abc import Iterable

from agentperf_redis.cache import commands
from agentperf_redis.cache.arguments import chunks, distinct_keys, stored_name, stored_tags
from agentperf_redis.cache.commands.replies import NoSettings
from agentperf_redis.cache.flows.settings import ATTEMPTS, ready
from agentperf_redis.cache.process.shared_state import Binding, Owed
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable


class Eraser:
    """Deletions and invalidations of one cache object.

    What fails because the server does not answer is owed to it: this process tells it before it reads or writes again.

    Args:
        binding: what it shares with other objects of the same cache.
    """

    def __init__(self, binding: Binding) -> None:
        self.binding = binding

    def delete_many(self, keys: Iterable[str]) -> Flow[int]:
        """Remove entries. Returns how many there were."""
        names = list(dict.fromkeys(map(stored_name, distinct_keys(keys))))
        removed = 0
        for chunk in chunks(names):
            for _ in range(ATTEMPTS):
                try:
                    yield from ready(self.binding)
                    reply = yield from commands.delete(self.binding.keys, chunk, self.binding.origin)
                except BackendUnavailable:
                    self.binding.owe((Owed.KEY, name) for name in names)  # again what is done does no harm
                    raise
                finally:
                    for name in chunk:
                        self.binding.changed(name)
                if not isinstance(reply, NoSettings):
                    removed += reply[0]
                    self.binding.learn(reply[1])
                    break
                self.binding.deployed = False
        return removed

    def delete(self, key: str) -> Flow[bool]:
        """Remove one entry. Returns whether there was one."""
        stored_name(key)  # so that a refusal names the argument of this method
        removed = yield from self.delete_many((key,))
        return removed > 0

    def clear(self) -> Flow[None]:
        """Make every entry a miss."""
        try:
            yield from ready(self.binding)
            _, version = yield from commands.clear(self.binding.keys, self.binding.origin)
        except BackendUnavailable:
            self.binding.owe([(Owed.ALL, "")])
            raise
        finally:
            self.binding.flights.detach_all()
            if self.binding.local is not None:
                self.binding.local.flush()
        self.binding.learn(version)

    def invalidate_tags(self, tags: Iterable[str]) -> Flow[None]:
        """Make every entry with one of the tags a miss."""
        names = stored_tags(tags)
        for chunk in chunks(list(names)):
            try:
                yield from ready(self.binding)
                version = yield from commands.invalidate_tags(self.binding.keys, tuple(chunk), self.binding.origin)
            except BackendUnavailable:
                self.binding.owe((Owed.TAG, tag) for tag in names)
                raise
            finally:
                self.binding.flights.detach_all()  # what tags their values will have is not known yet
                for tag in chunk:
                    if self.binding.local is not None:
                        self.binding.local.drop_tag(tag)
            self.binding.learn(version)

    def sweep(self) -> Flow[int]:
        """Clear away all that is expired, cleared or dropped. Returns how many entries and values that were."""
        total, cursor = 0, "0"
        yield from ready(self.binding)
        while True:
            swept = yield from commands.sweep(self.binding.keys, cursor)
            if isinstance(swept, NoSettings):
                return total
            total += swept.expired + swept.freed + swept.orphans + swept.evicted
            cursor = swept.cursor
            if cursor == "0" and not swept.more:
                return total
