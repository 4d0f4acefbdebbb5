"""The state that all objects of one cache share within a process: its settings, buffers, clock and waiters."""

from __future__ import annotations

import logging
import math
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
from agentperf_redis.cache.process.access_buffer import AccessBuffer
from agentperf_redis.cache.process.flights import Flights
from agentperf_redis.cache.process.local_copies import LocalCopies
from agentperf_redis.command import WakeUp
from agentperf_redis.errors import InvalidArgument

log = logging.getLogger("agentperf_redis")

MAX_PENDING_INVALIDATIONS = 10_000
"""Maximum keys and tags kept while the server is unreachable. Beyond that, recovery clears the whole cache."""
MAX_PENDING_RELEASES = 1000
"""Maximum compute leases to release after an outage. Leases beyond that end by their TTL."""
_WARN_EVERY_S = 10.0


class InvalidationScope(Enum):
    """The scope of an invalidation that could not be sent."""

    KEY = "a key, by its stored name"
    TAG = "a tag, percent-encoded"
    ALL = "everything"


PendingInvalidation: TypeAlias = tuple[InvalidationScope, str]


class SharedState:
    """One cache in this process.

    Args:
        backend: the server and namespace.
        service: "cache" or "tiered".
        name: name of the cache.
        settings: limits of the cache.
        given: marks the settings that a user chose; see `Settings.fields`.
        filled: called when there is something to report.
        used: called before each write and before each report of reads; None calls nothing.
    """

    def __init__(
        self,
        backend: Backend,
        service: str,
        name: str,
        settings: Settings,
        given: str,
        filled: Callable[[SharedState], None],
        used: Callable[[SharedState], None] | None = None,
    ) -> None:
        self.backend = backend
        self.service = service
        self.name = name
        self.keys = key_names.cache(backend.namespace, service, name)
        self.settings = settings
        self.given = given
        self.deployed = False
        self.seen = 0
        """The newest version that this process has seen in a reply."""
        self._filled = filled
        self.used = used
        self.access_buffer = AccessBuffer(lambda: backend.process, lambda: filled(self))
        self.flights = Flights()
        self.local: LocalCopies | None = None
        self._server_ahead_ms = 0.0
        self._warned_at = -_WARN_EVERY_S
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._off = False
        """Whether the objects of this cache are switched off."""
        self._start_empty()
        backend.on_new_epoch(self._deploy_again)
        backend.on_recovery(self._recovered)
        register_for_fork(self)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self.pending_invalidations: dict[PendingInvalidation, None] = {}
        """Invalidations that could not be sent, in order. They are sent before the next read or write."""
        self.pending_releases: dict[tuple[str, str], float] = {}
        """Compute leases whose end could not be reported: (stored name, token) -> its expiry, by `time.monotonic`.

        A server may still hold them when it answers again. They are released before the next read or write, so that no
        caller waits for their expiry.
        """
        self._waiting: dict[str, list[WakeUp]] = {}
        self._listening = False  # the bus of a forked child has no subscription yet

    def adopt(self, user: object, settings: Settings, given: str, *, off: bool = False) -> None:
        """Register one more object of this cache. Objects may differ in their TTLs: each applies its own TTLs.

        Args:
            user: the object.
            settings: its limits.
            given: marks the settings that a user chose; see `Settings.fields`.
            off: whether the object is switched off.

        Raises:
            InvalidArgument: another live object in this process has other limits, or is off while this one is on.
        """
        with self._lock:
            if len(self._users) and off != self._off:
                at, argument = next(each for each in enumerate(ARGUMENTS[self.service]) if all(each))  # the first size
                allowed = f"0, since cache {self.name!r} is off in this process" if self._off else "1 or more"
                is_on = f", since cache {self.name!r} is on in this process; name='...' makes a cache of its own"
                size = 0 if off else int(settings.fields[at])
                raise InvalidArgument(argument, size, allowed if self._off else allowed + is_on)
            self._off = off
            if not len(self._users):
                if (settings, given) != (self.settings, self.given):
                    self.settings, self.given, self.deployed = settings, given, False
            elif (settings, given) != (self.settings, self.given):
                held, marks = list(self.settings.fields), list(self.given)
                for at, (argument, requested) in enumerate(zip(ARGUMENTS[self.service], settings.fields, strict=True)):
                    if given[at] == "0" or (marks[at] == "1" and (requested == held[at] or argument.endswith("_ttl"))):
                        continue
                    if marks[at] == "1":
                        value = int(requested) if requested.isdigit() else requested
                        is_open = f"cache {self.name!r} is open in this process with {argument}={held[at]}"
                        allowed = f"{held[at]}, since {is_open}; name='...' makes a cache of its own"
                        raise InvalidArgument(argument, value, allowed)
                    held[at], marks[at] = requested, "1"
                    self.deployed = False
                self.settings, self.given = Settings.of(held), "".join(marks)
            self._users.add(user)
        if self.unsent and self.local is not None:  # as in `change`
            self.local.flush()

    @property
    def users(self) -> int:
        """The number of live objects of this cache."""
        return len(self._users)

    def change(self, argument: str, field: str) -> None:
        """Change one setting. The next call deploys the setting, which then applies to every process.

        Args:
            argument: name of the setting in the constructor.
            field: the new value as text, as in `Settings.fields`.
        """
        with self._lock:
            at = ARGUMENTS[self.service].index(argument)
            fields, marks = list(self.settings.fields), list(self.given)
            fields[at], marks[at] = field, "1"
            self.settings, self.given, self.deployed = Settings.of(fields), "".join(marks), False
        if self.local is not None:  # a read that a local copy answers sends nothing, so it would not deploy the setting
            self.local.flush()

    def use_local(self, max_entries: int, max_bytes: int | None) -> LocalCopies:
        """Return the local copies of this cache.

        Raises:
            InvalidArgument: this process already has local copies with other limits.
        """
        with self._lock:
            if self.local is None:
                bus, channel = self.backend.bus, self.keys.bus
                self.local = LocalCopies(
                    max_entries, max_bytes, lambda: bus.confirmed_at(channel), self.access_buffer.announce
                )
                self.access_buffer.drain = self.local.drain
            if (self.local.max_entries, self.local.max_bytes) != (max_entries, max_bytes):
                held = f"local_size={self.local.max_entries}, local_bytes={self.local.max_bytes}"
                raise InvalidArgument("local_size", max_entries, f"the limits of this cache in this process: {held}")
            return self.local

    @property
    def unsent(self) -> bool:
        """Whether the next call must send something first.

        This may be failed invalidations, leases to release, or settings that a user chose.
        """
        pending = self.pending_invalidations or self.pending_releases
        return bool(pending) or (not self.deployed and "1" in self.given)

    @property
    def origin(self) -> str:
        """The id of this process. Messages that this process causes on the bus contain it."""
        return self.backend.process

    def learn(self, version: int) -> None:
        """Record a version from a reply."""
        self.seen = max(self.seen, version)

    def changed(self, name: str, *, computed: bool = False) -> None:
        """Record a write of this process, even if its result is unknown, so that the process reads no older value."""
        if not computed:  # a computed value invalidates nothing, so callers may still join the flight
            self.flights.detach(name)
        if self.local is not None:
            self.local.drop(name)

    def add_pending(self, invalidations: Iterable[PendingInvalidation]) -> None:
        """Record failed invalidations. Although their callers got an error, no reader may get the values concerned."""
        with self._lock:
            self.pending_invalidations.update(dict.fromkeys(invalidations))
            if len(self.pending_invalidations) > MAX_PENDING_INVALIDATIONS:
                self.pending_invalidations = {(InvalidationScope.ALL, ""): None}
        self._filled(self)  # so that the invalidations are sent even without further reads

    def remove_pending(self, invalidations: Iterable[PendingInvalidation]) -> None:
        """Record that invalidations were sent."""
        with self._lock:
            for invalidation in invalidations:
                self.pending_invalidations.pop(invalidation, None)

    def release_later(self, name: str, token: str, lease_ms: int) -> None:
        """Release a compute lease as soon as the server answers. The lease may outlive the computation.

        Args:
            name: stored name of the key.
            token: token of the lease.
            lease_ms: TTL of the lease, ms.
        """
        with self._lock:
            if len(self.pending_releases) < MAX_PENDING_RELEASES:
                self.pending_releases[name, token] = time.monotonic() + lease_ms / 1000
        self._filled(self)

    def remove_released(self, leases: Iterable[tuple[str, str]]) -> None:
        """Record that leases were released, or have ended."""
        with self._lock:
            for lease in leases:
                self.pending_releases.pop(lease, None)

    def set_clock(self, server_ms: float, sent_at: float) -> None:
        """Record the server's time; `sent_at` is `time.monotonic()` before the request was sent."""
        self._server_ahead_ms = server_ms - sent_at * 1000

    def server_ms(self) -> int:
        """Return an upper bound of the server's time.

        The bound is not exact, since `set_clock` counts from `sent_at`, and the server read its clock after that.
        """
        return int(self._server_ahead_ms + time.monotonic() * 1000) + 1

    def until_ms(self) -> int:
        """Return the server time after which a request that is sent now must have no effect."""
        return self.server_ms() + math.ceil(self.backend.deadline * 1000)

    def warn(self, message: str, *args: object) -> None:
        """Log a warning, at most one every ten seconds."""
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            log.warning(message, *args)

    def wake_up_for(self, name: str) -> WakeUp:
        """Return a wake-up that is sent when the bus reports a change of a key. Release it with `forget_wake_up`."""
        wake_up = WakeUp()
        with self._lock:
            self._waiting.setdefault(name, []).append(wake_up)
        self.listen()
        return wake_up

    def listen(self) -> None:
        """Subscribe to the bus, if not done yet. Call this only when needed, since it starts the bus's thread."""
        if self._listening:
            return
        with self._lock:
            listen, self._listening = not self._listening, True
        if listen:
            self.backend.bus.subscribe(self.keys.bus, self._on_message, self._on_gap)

    def forget_wake_up(self, name: str, wake_up: WakeUp) -> None:
        """Release a wake-up."""
        with self._lock:
            left = self._waiting.get(name, [])
            if wake_up in left:
                left.remove(wake_up)
            if not left:
                self._waiting.pop(name, None)

    def _on_message(self, message: bytes) -> None:
        """Handle a message ``<kind> <version> <origin> <key or tag>``. Runs on the bus's thread."""
        try:
            kind, version, _, name = message.decode().split(" ", 3)
            at = int(version)
        except ValueError:  # an unreadable message: anything may have changed
            kind = "c"
        if kind == "c":
            if self.local is not None:
                self.local.flush()
            self._wake_all()
            return
        local = self.local
        if local is not None and kind in "sd":
            local.drop(name, older_than=at)
        elif local is not None and kind == "t":
            local.drop_tag(name, older_than=at)
        with self._lock:
            wake_ups = list(self._waiting.get(name, ()))
        for wake_up in wake_ups:
            wake_up.send()

    def _on_gap(self) -> None:
        if self.local is not None:
            self.local.set_aside()
        self._wake_all()

    def _wake_all(self) -> None:
        with self._lock:
            wake_ups = [wake_up for waiting in self._waiting.values() for wake_up in waiting]
        for wake_up in wake_ups:
            wake_up.send()

    def _deploy_again(self) -> None:
        self.deployed = False

    def _recovered(self) -> None:
        if self.local is not None:
            self.local.flush()
        if self.pending_invalidations or self.pending_releases:
            self._filled(self)

    def after_fork(self) -> None:
        """In the child: create new locks and buffers; the parent keeps the contents of the old ones."""
        self._start_empty()
        self.access_buffer.start_empty()
        self.flights.start_empty()
        if self.local is not None:
            self.local.start_empty()
