"""Runs the same operations on the scripts of locks and on a plain model, and compares the state after each one."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agentperf_redis.locks import commands
from agentperf_redis.locks.commands import Place, Refused, Spent, Taken
from tests.support.examples import examples
from tests.support.fake import Fake

DAY_S, DAY_MS = 86_400.0, 86_400_000
GRANTED_MS = 2 * 10**15
"""Expiry of a grant in the model: only `grant_expires` lets a grant expire."""


class SemaphoreMachine(RuleBasedStateMachine):
    """Leases, grants and waiters never expire by time, since the clock advances only 1 ms per call. Rules end them."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = Fake(ms_per_script=1)
        self.place = Place.of("n", "semaphore", "s")
        self.held: dict[str, int] = {}
        self.granted: dict[str, int] = {}
        self.waiting: dict[str, int] = {}
        self.tickets: dict[str, str] = {}
        self.spent: dict[str, str] = {}
        self.dead: set[str] = set()
        self.fence = 0
        self.tokens = 0

    def teardown(self) -> None:
        self.fake.close()

    @initialize(limit=st.integers(1, 3))
    def begin(self, limit: int) -> None:
        self.limit = limit

    def new_token(self) -> str:
        self.tokens += 1
        return f"@{self.tokens}"

    def units(self) -> int:
        return len(self.held) + len(self.granted)

    def is_free(self) -> bool:
        """Whether a new request would be granted. A new request does not overtake a waiter that still polls."""
        return self.units() < self.limit and not set(self.waiting) - self.dead

    def queue(self) -> list[str]:
        """Return the queue after a script has run. A script removes waiters that no longer poll from the front."""
        order = sorted(self.waiting, key=self.waiting.__getitem__)
        while order and order[0] in self.dead:
            order.pop(0)
        return order

    def raised(self, fence: int) -> int:
        assert fence > self.fence
        self.fence = fence
        return fence

    def acquire_as(self, token: str, *, live_ms: int = 0) -> Taken | Refused | Spent:
        ticket = self.tickets.get(token, commands.NO_TICKET)
        command = commands.acquire(self.place, token, ttl=DAY_S, limit=self.limit, live_ms=live_ms, ticket=ticket)
        answer: Taken | Refused | Spent = self.fake.run(command)
        if isinstance(answer, Refused) and live_ms:
            self.tickets[token] = answer.ticket
        return answer

    @rule()
    def acquire(self) -> None:
        token, free = self.new_token(), self.is_free()
        answer = self.acquire_as(token)
        assert isinstance(answer, Taken if free else Refused)
        if isinstance(answer, Taken):
            self.held[token] = self.raised(answer.fence)

    @rule()
    def wait(self) -> None:
        token, free = self.new_token(), self.is_free()
        answer = self.acquire_as(token, live_ms=DAY_MS)
        assert isinstance(answer, Taken if free else Refused)
        if isinstance(answer, Taken):
            self.held[token] = self.raised(answer.fence)
        else:
            assert answer == Refused(len(self.queue()), answer.retry_after, answer.ticket)
            self.waiting[token] = int(answer.ticket)

    @precondition(lambda self: self.waiting or self.granted)
    @rule(data=st.data())
    def poll(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted({*self.waiting, *self.granted})))
        answer = self.acquire_as(token, live_ms=DAY_MS)
        self.dead.discard(token)
        if token in self.granted:
            assert isinstance(answer, Taken)
            assert answer.fence == self.granted[token]
            self.held[token] = self.granted.pop(token)
        else:
            assert isinstance(answer, Refused)
            assert answer.ahead == self.queue().index(token)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def acquire_again(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.held)))
        answer = self.acquire_as(token)
        assert isinstance(answer, Taken)
        assert answer.fence == self.held[token]

    @precondition(lambda self: self.held or self.granted or self.waiting)
    @rule(data=st.data(), tombstone=st.booleans())
    def release(self, data: st.DataObject, tombstone: bool) -> None:
        token = data.draw(st.sampled_from(sorted({*self.held, *self.granted, *self.waiting})))
        command = commands.release(self.place, token, tombstone_ms=DAY_MS if tombstone else 0)
        assert self.fake.run(command) is (token not in self.waiting)
        assert self.fake.run(command) is False
        if tombstone:
            self.spent[token] = "cancelled" if token in self.waiting else "released"
        self.forget(token)

    @precondition(lambda self: self.spent)
    @rule(data=st.data(), live_ms=st.sampled_from([0, DAY_MS]))
    def acquire_too_late(self, data: st.DataObject, live_ms: int) -> None:
        token = data.draw(st.sampled_from(sorted(self.spent)))
        answer = self.acquire_as(token, live_ms=live_ms)
        assert isinstance(answer, Spent)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), seconds=st.sampled_from([100.0, DAY_S]), added=st.booleans())
    def extend(self, data: st.DataObject, seconds: float, added: bool) -> None:
        token = data.draw(st.sampled_from(sorted(self.held)))
        left = self.fake.run(commands.extend(self.place, token, seconds, added=int(added)))
        assert left is not None
        assert 0 < left <= DAY_S
        self.fake.run(commands.extend(self.place, token, DAY_S))
        assert self.fake.run(commands.extend(self.place, "@unknown", seconds)) is None

    @precondition(lambda self: self.held or self.granted)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted({*self.held, *self.granted})))
        self.fake.client.zadd(self.place.keys.held, {token: 1})
        assert self.fake.run(commands.extend(self.place, token, 1.0)) is None
        self.forget(token)
        self.acquire()  # any call ends expired leases

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def stop_polling(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.waiting)))
        self.acquire_as(token, live_ms=1)  # the next script runs after this 1 ms, so it counts the waiter as dead
        self.dead.add(token)

    def forget(self, token: str) -> None:
        self.dead.discard(token)
        for known in (self.held, self.granted, self.waiting):
            known.pop(token, None)
        self.tickets.pop(token, None)

    @invariant()
    def state_is_the_models(self) -> None:
        client, where = self.fake.client, self.place.keys
        now_ms = self.fake._now_ms
        state: dict[str, str] = client.hgetall(where.state)
        self.read_grants(state)
        expected = {*self.held, *self.granted}
        assert self.units() <= self.limit
        found: dict[str, Any] = dict(client.zrange(where.held, 0, -1, withscores=True))
        assert {token for token, at_ms in found.items() if at_ms > now_ms} == expected
        assert client.zrange(where.queue, 0, -1) == sorted(self.waiting, key=self.waiting.__getitem__)
        assert not (self.units() < self.limit and set(self.waiting) - self.dead), "free capacity, and a live waiter"
        assert {name for name in state if name[0] == "@"} == {*expected, *self.waiting}
        if not expected and not self.waiting:
            assert set(client.keys()) == {f"{self.place.keys.tag}:spent:{token}" for token in self.spent}
        assert all(client.pttl(key) > 0 for key in client.keys("*"))
        seen = self.fake.run(commands.look(self.place))
        assert (seen.held, seen.waiting) == (self.units(), len(self.waiting))

    def read_grants(self, state: dict[str, str]) -> None:
        """Read new grants, in the order of the queue, and drop waiters that stopped polling."""
        for token in sorted(self.waiting, key=self.waiting.__getitem__):
            record = state.get(token, "")
            if record.startswith("waiting "):
                continue
            del self.waiting[token]
            if record.startswith("grant "):
                # Every earlier waiter also got a grant, or has stopped polling.
                assert not any(self.waiting[other] < int(self.tickets[token]) for other in self.waiting)
                self.granted[token] = self.raised(int(record.split("fence=")[1].split(" ")[0]))
                self.fake.client.zadd(self.place.keys.held, {token: GRANTED_MS})
            else:
                assert token in self.dead
                self.forget(token)


@examples(3, 50)
def test_any_sequence_of_operations_matches_the_model(examples: int) -> None:
    effort = settings(max_examples=examples, stateful_step_count=40, deadline=None, phases=[Phase.generate])
    run_state_machine_as_test(SemaphoreMachine, settings=effort)
