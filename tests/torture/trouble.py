"""The faults of a torture run: dead and paused workers, a broken network, a paused, dead, full or forgetful server."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import redis

from agentperf_redis.balancer import commands as balancer_commands
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.support.workers import Worker

_PAUSES_S = (0.05, 0.3, 0.9)
"""Pauses of a worker or of the server, s: shorter and longer than the TTL of a lease."""
_LATE_S = 0.2
"""How long a request is delayed, s: much longer than a retry and a release take."""


class Trouble:
    """Injects one random fault at a time.

    Args:
        server: the server.
        proxy: the proxy between the workers and the server; None if the workers connect
            directly, as they do to a Cluster.
        crowd: the workers, by number.
        start: starts a worker with a number.
        seed: seed of the choices.

    Attributes:
        happened: number of faults of each kind.
        workers: number of workers started.
        killed: numbers of the workers that were killed.
    """

    def __init__(
        self, server: Server, proxy: Proxy | None, crowd: dict[int, Worker], start: Callable[[int], Worker], seed: int
    ) -> None:
        self._server, self._proxy, self._crowd, self._start = server, proxy, crowd, start
        self._chance = random.Random(seed)
        self.happened = Counter[str]()
        self.workers = len(crowd)
        self.killed: set[int] = set()
        usual: list[Callable[[], None]] = [
            *(self._kill_worker, self._pause_worker, self._pause_worker),
            *(self._forget_scripts, self._kill_clients, self._pause_server),
        ]
        rare: list[Callable[[], None]] = [self._restart_server, self._fill_memory]
        if proxy is not None:
            usual += [self._break_replies] * 4 + [self._delay_requests] * 3
            rare += [self._refuse_connections, self._drop_packets]
        self._kinds = usual * 2 + rare

    def strike(self) -> None:
        """Inject one fault, and wait until it is over."""
        kind = self._chance.choice(self._kinds)
        self.happened[kind.__name__.strip("_").replace("_", " ")] += 1
        kind()

    def end(self) -> None:
        """Remove everything that could still cause faults."""
        if self._proxy is not None:
            self._proxy.clear()
        self._server.recover()

    # Workers

    def _victim(self) -> int:
        return self._chance.choice(sorted(self._crowd))

    def _kill_worker(self) -> None:
        victim = self._victim()
        self._crowd.pop(victim).kill()
        self.killed.add(victim)
        self._crowd[self.workers] = self._start(self.workers)
        self.workers += 1

    def _pause_worker(self) -> None:
        worker = self._crowd[self._victim()]
        worker.pause()
        time.sleep(self._chance.choice(_PAUSES_S))
        worker.resume()

    # The network

    def _break_replies(self) -> None:
        assert self._proxy is not None
        for _ in range(3):
            kind = self._chance.choice(("reset_after_reply", "half_reply", "reset_before_request"))
            getattr(self._proxy, kind)(nth=self._chance.randrange(1, 50))
        time.sleep(0.1)

    def _delay_requests(self) -> None:
        assert self._proxy is not None
        self._proxy.hold(only=self._chance.choice((balancer_commands.ACQUIRE, balancer_commands.WAIT)), after=_LATE_S)
        self._proxy.hold(nth=self._chance.randrange(1, 50), after=_LATE_S)
        for _ in range(4):
            self._proxy.delay(_LATE_S, only="MGET", nth=self._chance.randrange(1, 20))
        time.sleep(0.1)

    def _refuse_connections(self) -> None:
        assert self._proxy is not None
        self._proxy.close_port()
        time.sleep(0.3)
        self._proxy.open_port()

    def _drop_packets(self) -> None:
        assert self._proxy is not None
        self._proxy.go_silent()
        time.sleep(0.5)
        self._proxy.speak_again()

    # The server

    def _forget_scripts(self) -> None:
        for node in self._server.nodes:
            with suppress(redis.RedisError), node.client() as client:  # a node of a Cluster may be restarting
                client.script_flush()

    def _kill_clients(self) -> None:
        for node in self._server.nodes:
            with suppress(redis.RedisError), node.client() as client:  # a node of a Cluster may be restarting
                client.client_kill_filter(_type=self._chance.choice(("normal", "pubsub")), skipme=True)

    def _pause_server(self) -> None:
        node = self._chance.choice(self._server.nodes)
        node.pause()
        time.sleep(self._chance.choice(_PAUSES_S))
        node.resume()

    def _restart_server(self) -> None:
        if self._server.clustered:
            node = self._chance.choice(self._server.nodes)
            node.kill()
            node.start()
        else:
            self._server.restart()

    def _fill_memory(self) -> None:
        for limit in ("1", "0"):
            for node in self._server.nodes:
                try:
                    with node.client() as client:
                        client.config_set("maxmemory", limit)
                except redis.RedisError:  # a node of a Cluster may be restarting; it starts without a limit
                    continue
            if limit == "1":
                time.sleep(0.3)
