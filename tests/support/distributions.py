"""Distributions of durations in s, for tests of quantile estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def bimodal(source: np.random.Generator, size: int) -> Any:
    return np.where(source.random(size) < 0.6, source.normal(0.05, 0.005, size), source.normal(8.0, 1.0, size))


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "lognormal": lambda source, size: source.lognormal(0.7, 0.8, size),
    "pareto": lambda source, size: 1 + source.pareto(1.2, size),
    "uniform": lambda source, size: source.uniform(0.0, 10.0, size),
    "bimodal": bimodal,
    "constant": lambda source, size: np.full(size, 0.734),
}
