"""What all objects of one cache have in common within a process: its settings, its buffers, its clock, its waiters."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TypeAlias

from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.background import register_for_fork
from agentperf_redis.cache.model import ARGUMENTS, Settings
from agentperf_redis.cache.process.access_buffer import Outbox
from agentperf_redis.cache.process.flights import Flights
from agentperf_redis.cache.process.local_copies import LocalCopies
from agentperf_redis.command import Hint
from agentperf_redis.errors import InvalidArgument

log = logging.getLogger("agentperf_redis")

MOST_OWED = 10_000
"""Names of keys and tags kept while the server is away; beyond, the whole cache is cleared on its return."""
_COMPLAIN_EVERY_S = 10.0


class Owed(Enum):
    """What the server could not be told to forget."""

    KEY = "a key, by its stored name"
    TAG = "a tag, percent-encoded"
    ALL = "everything"


Debt: TypeAlias = tuple[Owed, str]


class Binding:
    """One cache in this process.

    Args:
        backend: the namespace it lies in.
        service: "cache" or "tiered".
        name: of the cache.
        settings: its limits.
        given: which of them were chosen; see `Settings.fields`.
        filled: called when there is something to report.
    """

    def __init__(
        self,
        backend: Backend,
        service: str,
        name: str,
        settings: Settings,
        given: str,
        filled: Callable[[Binding], None],
    ) -> None:
        self.backend = backend
        self.service = service
        self.name = name
        self.keys = key_names.cache(backend.namespace, service, name)
        self.settings = settings
        self.given = given
        self.deployed = False
        self.seen = 0
        """The newest version that a reply has brought to this process."""
        self._filled = filled
        self.outbox = Outbox(lambda: backend.process, lambda: filled(self))
        self.flights = Flights()
        self.local: LocalCopies | None = None
        self._server_ahead_ms = 0.0
        self._complained_at = -_COMPLAIN_EVERY_S
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._start_empty()
        backend.on_new_epoch(self._deploy_again)
        backend.on_recovery(self._recovered)
        register_for_fork(self)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self.owed: dict[Debt, None] = {}
        """Invalidations that the server was not told of, in order: sent again before anything is read or written."""
        self._waiting: dict[str, list[Hint]] = {}
        self._listening = False  # a forked child's bus has no subscription yet

    def adopt(self, user: object, settings: Settings, given: str) -> None:
        """Count in one more object of this cache. Lives are no matter of dispute: each object applies its own.

        Raises:
            InvalidArgument: another living object of this process has other limits.
        """
        with self._lock:
            if not len(self._users):
                if (settings, given) != (self.settings, self.given):
                    self.settings, self.given, self.deployed = settings, given, False
            elif (settings, given) != (self.settings, self.given):
                held, marks = list(self.settings.fields), list(self.given)
                for at, (argument, asked) in enumerate(zip(ARGUMENTS[self.service], settings.fields, strict=True)):
                    if given[at] == "0" or (marks[at] == "1" and (asked == held[at] or argument.endswith("_ttl"))):
                        continue
                    if marks[at] == "1":
                        value = int(asked) if asked.isdigit() else asked
                        raise InvalidArgument(
                            argument, value, f"cache {self.name!r} is open here with {argument}={held[at]}"
                        )
                    held[at], marks[at] = asked, "1"
                    self.deployed = False
                self.settings, self.given = Settings.of(held), "".join(marks)
            self._users.add(user)

    def use_local(self, most_entries: int, most_bytes: int | None) -> LocalCopies:
        """Return the local copies of this cache.

        Raises:
            InvalidArgument: this process has them with other limits already.
        """
        with self._lock:
            if self.local is None:
                bus, channel = self.backend.bus, self.keys.bus
                self.local = LocalCopies(
                    most_entries, most_bytes, lambda: bus.confirmed_at(channel), self.outbox.announce
                )
                self.outbox.drain = self.local.drain
            if (self.local.most_entries, self.local.most_bytes) != (most_entries, most_bytes):
                held = f"local_size={self.local.most_entries}, local_bytes={self.local.most_bytes}"
                raise InvalidArgument("local_size", most_entries, f"what this cache has in this process: {held}")
            return self.local

    @property
    def origin(self) -> str:
        """Who writes, as told on the bus."""
        return self.backend.process

    def learn(self, version: int) -> None:
        """Take note of a version from a reply."""
        self.seen = max(self.seen, version)

    def changed(self, name: str, *, computed: bool = False) -> None:
        """After a write of this process, also one of unknown fate: it must not see its own values of before."""
        if not computed:  # what a flight brings needs not end the next one
            self.flights.detach(name)
        if self.local is not None:
            self.local.drop(name)

    def owe(self, debts: Iterable[Debt]) -> None:
        """Take note of invalidations that failed: their caller knows, but nobody should read what they were to end."""
        with self._lock:
            self.owed.update(dict.fromkeys(debts))
            if len(self.owed) > MOST_OWED:
                self.owed = {(Owed.ALL, ""): None}
        self._filled(self)  # so that it is told also if nobody reads

    def paid(self, debts: Iterable[Debt]) -> None:
        """Take note that the server was told."""
        with self._lock:
            for debt in debts:
                self.owed.pop(debt, None)

    def set_clock(self, server_ms: float, asked_at: float) -> None:
        """Take note of the server's time; `asked_at` is `time.monotonic()` before the question was sent."""
        self._server_ahead_ms = server_ms - asked_at * 1000

    def server_ms(self) -> int:
        """Return a time that the server's clock has not passed: it was read after `asked_at`."""
        return int(self._server_ahead_ms + time.monotonic() * 1000) + 1

    def complain(self, message: str, *args: object) -> None:
        """Log a warning, at most one every ten seconds."""
        now = time.monotonic()
        if now - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now
            log.warning(message, *args)

    def hint_for(self, name: str) -> Hint:
        """Return a hint that is given when the bus brings word of a key. To be taken back with `forget_hint`."""
        hint = Hint()
        with self._lock:
            self._waiting.setdefault(name, []).append(hint)
        self.listen()
        return hint

    def listen(self) -> None:
        """Hear what the bus brings from now on. It starts the bus's thread, so nobody listens without need."""
        if self._listening:
            return
        with self._lock:
            listen, self._listening = not self._listening, True
        if listen:
            self.backend.bus.subscribe(self.keys.bus, self._heard, self._missed_some)

    def forget_hint(self, name: str, hint: Hint) -> None:
        """Take a hint back."""
        with self._lock:
            left = self._waiting.get(name, [])
            if hint in left:
                left.remove(hint)
            if not left:
                self._waiting.pop(name, None)

    def _heard(self, message: bytes) -> None:
        """On the bus's thread: ``<kind> <version> <origin> <key or tag>``."""
        try:
            kind, version, _, name = message.decode().split(" ", 3)
            at = int(version)
        except ValueError:  # whatever it was meant to say, something may have changed
            kind = "c"
        if kind == "c":
            if self.local is not None:
                self.local.flush()
            self._look_all()
            return
        local = self.local
        if local is not None and kind in "sd":
            local.drop(name, older_than=at)
        elif local is not None and kind == "t":
            local.drop_tag(name, older_than=at)
        with self._lock:
            hints = list(self._waiting.get(name, ()))
        for hint in hints:
            hint.give()

    def _missed_some(self) -> None:
        if self.local is not None:
            self.local.set_aside()
        self._look_all()

    def _look_all(self) -> None:
        with self._lock:
            hints = [hint for waiting in self._waiting.values() for hint in waiting]
        for hint in hints:
            hint.give()

    def _deploy_again(self) -> None:
        self.deployed = False

    def _recovered(self) -> None:
        if self.local is not None:
            self.local.flush()
        if self.owed:
            self._filled(self)

    def after_fork(self) -> None:
        """In the child: locks and buffers are made anew; what waits in them is the parent's business."""
        self._start_empty()
        self.outbox.start_empty()
        self.flights.start_empty()
        if self.local is not None:
            self.local.start_empty()
