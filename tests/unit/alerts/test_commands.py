"""The replies to commands of alerts, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.alerts import commands
from agentperf_redis.errors import CorruptState

CLAIM = commands.claim(keys.alerts("n"), as_of_ms=-1, count=9, token="t")


def test_claimed_rules_are_read() -> None:
    assert CLAIM.decode([1, 2, 3000, b"a%20b", 5]) == commands.Claimed(2, 3.0, (("a b", 5),))


@pytest.mark.parametrize("at_ms", [b"x", b"9" * 5000, None, []])
def test_unexpected_time_of_a_claimed_rule_is_corrupt_state(at_ms: Any) -> None:
    with pytest.raises(CorruptState):
        CLAIM.decode([1, 2, 3000, b"a", at_ms])


def test_claim_with_an_unreadable_name_or_payload_is_read() -> None:
    """The script has already written all claims, so an error would hide the others. An unreadable name fits no rule."""
    assert CLAIM.decode([1, 2, 3000, b"b\xb0", 5, b"a", 6]).due == (("b\ufffd", 5), ("a", 6))
    notices = commands.claim_notices(keys.alerts("n"), ("ops/0",))
    assert notices.decode([1, b"ops%2F0", b"i", 0, b"{\xff}"]) == [commands.ClaimedNotice("ops/0", "i", 0, "{\ufffd}")]
