"""The number of examples of a test: few in a plain run of the tests, many in a thorough run."""

from __future__ import annotations

import pytest


def examples(plain: int, thorough: int) -> pytest.MarkDecorator:
    """Parametrize a test's argument `examples`, once for each kind of run."""
    counts = [plain, pytest.param(thorough, marks=[pytest.mark.thorough, pytest.mark.waits])]
    return pytest.mark.parametrize("examples", counts, ids=["few", "many"])
