"""A circuit breaker: while a node is known not to answer, commands for the node fail at once.

Without the breaker, each command would wait for its deadline. If an outage is shorter than a deadline, retries suffice.
If a command gets no answer within its whole deadline, a probe follows. The breaker opens if the probe gets no answer
either. So one slow command or one lost connection does not open the breaker. While the breaker is open, a background
thread probes the node a few times per second, and the first answer closes the breaker. Commands of callers are not used
as probes. Commands that are in flight when the breaker opens are retried until their deadline.

Source: M. Nygard, "Release It!" (2007), chapter 5, with a separate probe instead of the half-open state.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from agentperf_redis.background import Background
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.last_resort import OUTAGE
from agentperf_redis.random_numbers import uniform
from agentperf_redis.transport.topology import Node, Topology

_log = logging.getLogger("agentperf_redis")

PROBE_S = 0.5
"""Timeout of a probe. It can be short, because the node has already left a whole deadline without an answer."""
_MIN_PROBE_PAUSE_S, _MAX_PROBE_PAUSE_S = 0.15, 0.3
"""Bounds of the random pause between probes.

With these bounds, a recovery is detected within a second. The pause is random so that a thousand processes do not probe
at the same time.
"""
_CALM_S = 1.0
"""After a successful probe, a node is not probed again for this many seconds, even if a command gets no answer."""


class _Outage:
    """A node that does not answer."""

    __slots__ = ("refused", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.refused = 0


class Breaker:
    """Knows which nodes do not answer. All drivers of a backend share it. It is thread-safe.

    Args:
        topology: the map of keys to nodes.
        attempt_timeout_s: the default deadline. A command with a shorter deadline causes no probe.
        answers: probes a node and returns within `PROBE_S` whether it answers.
        learn: refreshes the topology; None for a fixed topology.
        recovered: called on a background thread after a node answers again and its commands are no longer refused.

    Attributes:
        open: the nodes that do not answer. If there are none, as is usual, the fast path of a command skips the
            breaker.
    """

    def __init__(
        self,
        topology: Topology,
        attempt_timeout_s: float,
        answers: Callable[[Node], bool],
        learn: Callable[[], object] | None,
        recovered: Callable[[], None],
    ) -> None:
        self._topology = topology
        self._attempt_timeout_s = attempt_timeout_s
        self._answers = answers
        self._learn = learn
        self._recovered = recovered
        # Recovery and the probes have separate threads. If the server goes down again during a recovery, a probe must
        # run while the commands of the recovery wait.
        self._recovery = Background("agentperf-recovery", lingers=False)
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: close the breaker. The child has no threads yet, and the state of the nodes is unknown."""
        self.open: dict[Node, _Outage] = {}
        self._lock = threading.RLock()  # reentrant, because a signal handler may close the client
        """Held while an outage is recorded, so that no outage is recorded after `stop`."""
        self._stopped = False
        self._calm_until: dict[Node, float] = {}
        self._watches: dict[Node, Background] = {}
        """A thread for each suspected node. The thread ends when the suspicion ends."""

    def refusal(self, node: Node | None) -> BackendUnavailable | None:
        """Return the error for a command to this node, or None to let the command pass."""
        outage = self.open.get(node) if node is not None else None
        if outage is None:
            return None
        outage.refused += 1  # without the lock, because the count is only logged
        silent_s = time.monotonic() - outage.since
        reason = f"it has not answered for {silent_s:.1f} s; commands fail at once until it does"
        return BackendUnavailable(self._topology.address.masked, "not_applied", self._topology.located(node, reason))

    def suspect(self, node: Node, deadline_s: float) -> None:
        """Report a command that got no answer from this node within the command's deadline. Does not block."""
        if deadline_s < self._attempt_timeout_s:  # with a longer deadline, the node might have answered in time
            return
        if self._needs_probe(node):
            watch = self._watches.get(node)
            if watch is None:
                watch = self._watches.setdefault(node, Background("agentperf-breaker", lingers=False))
            watch.put(partial(self._probe, node, watch))

    def stop(self) -> None:
        """Let all commands pass from now on: a closing client must try its last commands, even during an outage."""
        with self._lock:
            self._stopped = True
            self.open.clear()
        for watch in list(self._watches.values()):
            watch.close(0.0)

    def _needs_probe(self, node: Node) -> bool:
        """Whether to probe this node. A node that has just answered a probe, or is known to be down, needs no probe."""
        return not (self._stopped or node in self.open or self._calm_until.get(node, 0.0) > time.monotonic())

    def _probe(self, node: Node, watch: Background) -> None:
        """Probe a node that is suspected to be down. Refuse its commands if it does not answer."""
        if not self._needs_probe(node):
            return
        if self._answers(node):
            self._calm_until[node] = time.monotonic() + _CALM_S
            return
        with self._lock:
            if self._stopped:
                return
            outage = self.open[node] = _Outage(time.monotonic() - self._attempt_timeout_s)
        _log.warning("%s does not answer: commands for it fail at once until it does", self._name(node), extra=OUTAGE)
        self._probe_later(node, outage, watch)

    def _probe_later(self, node: Node, outage: _Outage, watch: Background) -> None:
        due = time.monotonic() + uniform(_MIN_PROBE_PAUSE_S, _MAX_PROBE_PAUSE_S)
        watch.at(due, partial(self._probe_again, node, outage, watch))

    def _probe_again(self, node: Node, outage: _Outage, watch: Background) -> None:
        """Probe a node again. If it answers or is no longer in use, let its commands pass."""
        if self.open.get(node) is not outage:  # the breaker was stopped
            return
        try:
            cause = self._closing_reason(node)
        except BaseException:
            self.open.pop(node, None)  # after a fault of the probe, commands must not be refused forever
            raise
        if not cause:
            self._probe_later(node, outage, watch)
            return
        with self._lock:
            if self._stopped:
                return
            self.open.pop(node, None)
        seconds = time.monotonic() - outage.since
        refused = outage.refused
        _log.warning("%s %s, after %.1f s; commands that failed at once: %d", self._name(node), cause, seconds, refused)
        self._recovery.put(self._recovered)

    def _name(self, node: Node) -> str:
        address = self._topology.address.masked
        return address if self._topology.fixed else f"{node.host}:{node.port} of {address}"

    def _closing_reason(self, node: Node) -> str:
        """Return why the breaker may close; an empty text if it must stay open."""
        if self._answers(node):
            return "answers again"
        if self._learn is not None:
            self._learn()  # another node may have taken over; commands that are refused do not refresh the topology
        return "" if self._topology.uses(node) else "is no longer in use"
