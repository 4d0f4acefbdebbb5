"""The state that all objects of one cache share within a process: settings, shards, local copies and waiters."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain

from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.background import register_for_fork
from agentperf_redis.cache.model import ARGUMENTS, Settings
from agentperf_redis.cache.process.flights import Flights
from agentperf_redis.cache.process.local_copies import LocalCopies
from agentperf_redis.cache.process.shard import InvalidationScope, PendingInvalidation, Shard
from agentperf_redis.command import WakeUp
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.transport.pubsub import listener  # noqa: F401  see `Bus.subscribe`
from agentperf_redis.transport.pubsub.subscriptions import Subscription

log = logging.getLogger("agentperf_redis")

_WARN_EVERY_S = 10.0


class SharedState:
    """One cache in this process.

    Args:
        backend: the server and namespace.
        service: "cache" or "tiered".
        name: name of the cache.
        settings: limits of the cache.
        given: one mark for each of the `Settings.fields`: "1" if a user chose the setting, otherwise "0".
        filled: called when there is something to report about a shard.
        used: called before each write and before each report of reads; None calls nothing.

    Attributes:
        keys: key names of the cache as a whole; the key `meta` holds the settings. A cache with one shard has no other
            keys.
        shards: the shards among which the entries are divided. A flow gets the shard of a key from
            `flows.settings.shard_to_read` or `shard_to_write`, which first learn how many shards there are.
    """

    def __init__(
        self,
        backend: Backend,
        service: str,
        name: str,
        settings: Settings,
        given: str,
        filled: Callable[[Shard], None],
        used: Callable[[SharedState], None] | None = None,
    ) -> None:
        self.backend = backend
        self.service = service
        self.name = name
        self.keys = key_names.cache(backend.namespace, service, name)
        self.settings = settings
        self.given = given
        self.deployed = False
        """Whether this process has sent the settings of the whole cache. Each shard also gets its share of the
        limits."""
        self.laid_out = False
        """Whether the layout in this process is known to be the layout on the server."""
        self._followed = False
        """Whether the number of shards was once the same here and on the server. Then this process follows changes."""
        self.layout = 0
        """Number of the layout; see `flows.layouts`."""
        self.layout_seen_at = time.monotonic()
        """When this process last read the layout from the server, by `time.monotonic`."""
        self._filled = filled
        self.used = used
        self.flights = Flights()
        self.local: LocalCopies | None = None
        self._warned_at = -_WARN_EVERY_S
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._off = False
        """Whether the objects of this cache are switched off."""
        self.shards: tuple[Shard, ...] = self._new_shards(settings.shards)
        self._start_empty()
        backend.on_new_epoch(self._deploy_again)
        backend.on_recovery(self._recovered)
        register_for_fork(self)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._drain_lock = threading.Lock()
        self._waiting: dict[str, list[WakeUp]] = {}
        # A forked child has its own bus, without subscriptions.
        self._subscriptions: dict[Shard, Subscription] = {}
        self._listens_to_all = False
        self._undelivered: dict[Shard, list[tuple[str, int, int]]] = {}
        """Reads that local copies have counted and that no shard has taken yet; see `LocalCopies.drain`."""

    def _new_shards(self, count: int) -> tuple[Shard, ...]:
        where = key_names.cache_shards(self.backend.namespace, self.service, self.name, count, self.layout)
        shards = tuple(Shard(self, number, keys, self._filled) for number, keys in enumerate(where))
        for shard in shards:
            if self.local is not None:
                self._report_copies(shard)
        return shards

    def shard(self, name: str) -> Shard:
        """Return the shard of the key that has this stored name."""
        shards = self.shards
        return shards[0] if len(shards) == 1 else shards[key_names.cache_shard(name, len(shards))]

    def lay_out(self, stored: Settings) -> None:
        """Use the layout that the server has.

        Args:
            stored: the settings in effect.

        Raises:
            InvalidArgument: a user of this process has chosen another number of shards, and no process has changed the
                number of shards since then.
        """
        where = (self.backend.namespace, self.service, self.name, stored.source, stored.layout - 1)
        old = key_names.cache_shards(*where) if stored.source else ()
        with self._lock:
            if stored.shards != len(self.shards) or stored.layout != self.layout:
                is_change = self._followed and stored.layout > self.layout
                if self.given[-1] == "1" and stored.shards != len(self.shards) and not is_change:
                    raise self._refused_shards(len(self.shards), stored.shards)
                fields = zip(self.given, self.settings.fields, stored.fields, strict=True)
                own = Settings.of([own if given == "1" else other for given, own, other in fields])
                self.settings = replace(own, shards=stored.shards)
                self.layout = stored.layout
                self._divide(stored.shards, old)
            else:
                for shard in self.shards:
                    shard.old = old
            self.layout_seen_at = time.monotonic()
            self.laid_out = self._followed = True

    def _refused_shards(self, requested: int, present: object) -> InvalidArgument:
        allowed = f"{present}, the number of shards of cache {self.name!r}; to change it, run `agentperf cache reshard "
        return InvalidArgument("shards", requested, f"{allowed}{self.name} --shards {requested}`")

    def _divide(self, count: int, previous: tuple[key_names.CacheKeys, ...] = ()) -> None:
        """Replace the shards. Unsent invalidations move to the new shards. Reads buffered in the old shards do not.

        Args:
            count: number of shards.
            previous: the shards of the previous layout, which may still hold entries; empty if there are none.
        """
        old, subscriptions = self.shards, self._subscriptions
        shards = self._new_shards(count)
        for shard in shards:
            shard.old = previous
        # Assign only after `old` is set: another thread must not use a new shard without knowing the previous layout.
        self.shards = shards
        self._subscriptions, self._listens_to_all = {}, False
        for subscription in subscriptions.values():
            subscription.close()
        if self.local is not None:
            self.local.flush()
        with self._drain_lock:
            undelivered, self._undelivered = self._undelivered, {}
            for read in chain.from_iterable(undelivered.values()):
                self._undelivered.setdefault(self.shard(read[0]), []).append(read)
        for shard in old:
            self.add_pending(shard.retire())
        for wake_up in [wake_up for waiting in self._waiting.values() for wake_up in waiting]:
            wake_up.send()  # the waiters wake up and query their new shards

    def add_pending(self, invalidations: Iterable[PendingInvalidation]) -> None:
        """Record failed invalidations for the shards that they concern."""
        for scope, name in invalidations:
            for concerned in (self.shard(name),) if scope is InvalidationScope.KEY else self.shards:
                concerned.add_pending([(scope, name)])

    def adopt(self, user: object, settings: Settings, given: str, *, off: bool = False) -> None:
        """Register one more object of this cache. Objects may differ in their TTLs: each applies its own TTLs.

        Args:
            user: the object.
            settings: its limits.
            given: one mark for each of the `Settings.fields`: "1" if a user chose the setting, otherwise "0".
            off: whether the object is switched off.

        Raises:
            InvalidArgument: another live object in this process has other limits, or only one of the two is switched
                off.
        """
        with self._lock:
            if len(self._users) and off != self._off:
                # Find the first size. `all(each)` skips the policy, because its index is 0. It also skips settings that
                # no argument sets, because their name in ARGUMENTS is empty.
                at, argument = next(each for each in enumerate(ARGUMENTS[self.service]) if all(each))
                allowed = f"0, since cache {self.name!r} is off in this process" if self._off else "1 or more"
                is_on = f", since cache {self.name!r} is on in this process; name='...' makes a cache of its own"
                size = 0 if off else int(settings.fields[at])
                raise InvalidArgument(argument, size, allowed if self._off else allowed + is_on)
            self._off = off
            if not len(self._users):
                if given[-1] == "0":  # the user chose no number of shards: keep the number known so far
                    settings = replace(settings, shards=len(self.shards))
                if (settings, given) != (self.settings, self.given):
                    self._set(settings, given)
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
                    if argument == "shards" and self.laid_out and requested != held[at]:
                        raise self._refused_shards(settings.shards, held[at])
                    held[at], marks[at] = requested, "1"
                merged = Settings.of(held)
                if (merged, "".join(marks)) != (self.settings, self.given):
                    self._set(merged, "".join(marks))
            self._users.add(user)
        if self.local is not None and any(shard.unsent for shard in self.shards):
            self.local.flush()  # the next read must reach the server to deploy the settings

    def _set(self, settings: Settings, given: str) -> None:
        """Replace the settings. The next call of each shard deploys them."""
        self.settings, self.given, self.deployed = settings, given, False
        if settings.shards != len(self.shards):
            self.laid_out = self._followed = False
            self._divide(settings.shards)
        for shard in self.shards:
            shard.deployed = False

    @property
    def users(self) -> int:
        """The number of live objects of this cache."""
        return len(self._users)

    def change(self, argument: str, field: str) -> None:
        """Change one setting. The next call deploys the setting, which then applies to every process.

        Args:
            argument: name of the setting in the constructor.
            field: the new value as text, as in `Settings.fields`.

        Raises:
            InvalidArgument: the limit is too small to be divided among the shards of the cache.
        """
        with self._lock:
            at = ARGUMENTS[self.service].index(argument)
            fields, marks = list(self.settings.fields), list(self.given)
            fields[at], marks[at] = field, "1"
            changed = Settings.of(fields)
            changed.check_shards(self.service)
            self._set(changed, "".join(marks))
        if self.local is not None:  # the next read must reach the server to deploy the setting
            self.local.flush()

    def use_local(self, max_entries: int, max_bytes: int | None) -> LocalCopies:
        """Return the local copies of this cache.

        Raises:
            InvalidArgument: this process already has local copies with other limits.
        """
        with self._lock:
            if self.local is None:
                self.local = LocalCopies(
                    *(max_entries, max_bytes, self._bus_confirmed_at),
                    lambda name: self.shard(name).access_buffer.announce(),
                )
                for shard in self.shards:
                    self._report_copies(shard)
            if (self.local.max_entries, self.local.max_bytes) != (max_entries, max_bytes):
                held = f"local_size={self.local.max_entries}, local_bytes={self.local.max_bytes}"
                raise InvalidArgument("local_size", max_entries, f"the limits of this cache in this process: {held}")
            return self.local

    def _bus_confirmed_at(self) -> float:
        """Return the latest time before which all messages about all shards were delivered.

        The slowest shard decides. So one lost node stops the use of all local copies, and reads of entries on the other
        nodes cost a round trip.
        """
        confirmed_at = self.backend.bus.confirmed_at
        return min(confirmed_at(shard.keys.bus) for shard in self.shards)

    def _report_copies(self, shard: Shard) -> None:
        """Let the reports of a shard include the reads that local copies have answered."""

        def drain() -> list[tuple[str, int, int]]:
            if self.local is None:
                return []
            with self._drain_lock:
                for read in self.local.drain():
                    self._undelivered.setdefault(self.shard(read[0]), []).append(read)
                return self._undelivered.pop(shard, [])

        shard.access_buffer.drain = drain

    @property
    def origin(self) -> str:
        """The id of this process. Messages that this process causes on the bus contain it."""
        return self.backend.process

    def changed(self, name: str, *, computed: bool = False) -> None:
        """Record a write of this process, also if its result is unknown. The process then reads no older value."""
        if not computed:  # a computed value invalidates nothing, so callers may still join the flight
            self.flights.detach(name)
        if self.local is not None:
            self.local.drop(name)

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
        self._listen(self.shard(name))
        return wake_up

    def listen(self) -> None:
        """Subscribe to all changes, if not done yet. Call this only when needed, since it starts the bus's thread."""
        if not self._listens_to_all:
            shards = self.shards
            for shard in shards:
                self._listen(shard)
            with self._lock:
                self._listens_to_all = shards is self.shards

    def _listen(self, shard: Shard) -> None:
        if shard in self._subscriptions:
            return
        with self._lock:
            if shard not in self._subscriptions and not shard.retired:
                subscribe = self.backend.bus.subscribe
                self._subscriptions[shard] = subscribe(shard.keys.bus, self._on_message, self._on_gap)

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
        for shard in self.shards:
            shard.deployed = False

    def _recovered(self) -> None:
        if self.local is not None:
            self.local.flush()
        for shard in self.shards:
            shard.send_soon()

    def after_fork(self) -> None:
        """In a forked child: create new locks and empty buffers. The parent sends the contents of the old buffers."""
        self._start_empty()
        for shard in self.shards:
            shard.after_fork()
        self.flights.start_empty()
        if self.local is not None:
            self.local.start_empty()
