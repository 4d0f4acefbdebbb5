from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from agentperf_redis.metrics.llm_shapes import BESIDE, SHAPES, WITHIN, Counts, Shape, amount, counts, fitting, whole

SHAPE = Shape(
    "vendor", "1", "in", "out", more_in=("tools",), cached_in=("details.cached", "cached"), cache_write=("a+b",),
    reasoning=("thought",), total="total",
)  # fmt: skip
BESIDES = Shape(
    "vendor", "1", "in", "out", cached_in=("cached",), cache_write=("a",), cached=BESIDE, reasoning=("thought",),
    thought=BESIDE, total="total",
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "given", "expected"),
    [
        (SHAPE, {"in": 10, "out": 5}, Counts(10, 5)),
        (SHAPE, {"in": 10, "out": 5, "details.cached": 4, "cached": 9, "a": 1, "b": 2}, Counts(10, 5, 4, 3)),
        (SHAPE, {"in": 10, "out": 5, "cached": 9, "tools": 7}, Counts(17, 5, 9)),
        (SHAPE, {"in": 10, "out": 5, "cached": 9, "total": 24}, Counts(19, 5, 9)),
        (SHAPE, {"in": 10, "out": 5, "cached": 4, "a": 6, "total": 21}, Counts(16, 5, 4, 6)),
        (SHAPE, {"in": 10, "out": 5, "cached": 11}, Counts(21, 5, 11)),
        (SHAPE, {"in": 10, "out": 5, "thought": 4, "total": 19}, Counts(10, 9, reasoning=4)),
        (SHAPE, {"in": 10, "out": 5, "thought": 4, "total": 15}, Counts(10, 5, reasoning=4)),
        (SHAPE, {"in": 10, "out": 5, "thought": 6}, Counts(10, 11, reasoning=6)),
        (SHAPE, {"in": 10, "out": 5, "thought": 4, "total": 99}, Counts(10, 5, reasoning=4, differs=True)),
        (BESIDES, {"in": 10, "out": 5, "cached": 4, "a": 2, "thought": 3}, Counts(16, 8, 4, 2, 3)),
        (BESIDES, {"in": 10, "out": 5, "cached": 4, "thought": 3, "total": 15}, Counts(10, 5, 4, 0, 3)),
        (BESIDES, {"in": 10, "out": 5, "cached": 4, "thought": 3, "total": 18}, Counts(10, 8, 4, 0, 3)),
        (BESIDES, {"in": 10, "total": 15}, Counts(10, 5)),
        (BESIDES, {"out": 5, "cached": 4, "total": 15}, Counts(10, 5, 4)),
        (BESIDES, {"total": 15}, None),
    ],
)
def test_total_takes_precedence_over_the_table(shape: Shape, given: dict[str, int], expected: Counts | None) -> None:
    assert counts(shape, given.get) == expected


def test_parts_never_exceed_their_wholes() -> None:
    for shape in (SHAPE, BESIDES):
        for sent in (0, 1, 5):
            for cached in (0, 3, 6):
                for written in (0, 2):
                    for thought in (0, 4):
                        for total in (0, 3, 9, 12):
                            given = {
                                "in": sent,
                                "out": 3,
                                "cached": cached,
                                "a": written,
                                "thought": thought,
                                "total": total,
                            }
                            read = counts(shape, given.get)
                            assert read is not None
                            assert read.cached_in + read.cache_write <= read.tokens_in, given
                            assert read.reasoning <= read.tokens_out, given
                            assert not total or read.differs or read.tokens_in + read.tokens_out == total, given


def test_table_names_every_source_with_its_version() -> None:
    for shape in SHAPES:
        assert shape.vendor
        assert any(character.isdigit() for character in shape.source), shape.vendor


def test_shapes_are_found_by_their_own_names() -> None:
    for shape in SHAPES:
        names = frozenset({shape.tokens_in.partition(".")[0], *shape.marks[:1]})
        assert shape in fitting(names), shape.vendor
    assert fitting(frozenset({"id", "model"})) == ()
    assert {shape.cached for shape in SHAPES} == {WITHIN, BESIDE}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0), (7, 7), (7.9, 7), (Decimal("7.9"), 7), (Fraction(15, 2), 7), (np.int32(7), 7), (np.float32(7), 7),
        (-1, None), (2**53, None), (float("nan"), None), (float("inf"), None), (True, None), ("7", None), (None, None),
    ],
)  # fmt: skip
def test_whole_numbers_are_counts(value: Any, expected: int | None) -> None:
    assert whole(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, 0.5), (1, 1.0), (Decimal("0.5"), 0.5), (np.float64(0.5), 0.5), (0, 0.0), (-1, 0.0), (1e9, 0.0),
        (float("nan"), 0.0), (float("inf"), 0.0), (True, 0.0), ("1", 0.0), (None, 0.0),
    ],
)  # fmt: skip
def test_positive_amounts_are_costs(value: Any, expected: float) -> None:
    assert amount(value) == expected
