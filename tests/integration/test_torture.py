"""All three services at once, under random faults. `python -m tests.torture --seconds 600` runs longer."""

from __future__ import annotations

import pytest

from tests.support.servers import ServerKind
from tests.torture.mutants import MUTANTS, POOL_MUTANTS
from tests.torture.run import Torture, first_complaint

SECONDS, CATCH_WITHIN_S = 8.0, 60.0

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("kind", ["valkey", "redis82", "cluster", "cluster82"])
def test_every_guarantee_holds_under_random_faults(kind: ServerKind) -> None:
    report = Torture(kind, SECONDS, seed=1).run()
    assert report.complaints == []
    assert report.grants > 50
    assert report.faults.total() >= 12
    for kind_of_line in ("got", "read", "wrote", "found", "delivered", "transition"):
        assert report.done[kind_of_line], kind_of_line


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant not in POOL_MUTANTS])
def test_fault_in_the_library_is_found(mutant: str) -> None:
    """The balancer's own torture test covers the faults in the balancer's scripts."""
    assert first_complaint("valkey", mutant, CATCH_WITHIN_S, seed=1)
