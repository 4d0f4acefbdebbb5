"""The model calls of `agentperf demo --llm`: each step is recorded as if a language model had done its work.

No model is called. The token counts are estimated from the characters of a step's input and output: four characters
are one token. The models and their prices are made up. If the result of a step came from a cache, its input counts as
read from the provider's cache, at a tenth of the price.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English text. It keeps the counts reproducible without a tokenizer."""
NOTE = (
    f"no model is called: tokens are counted characters of each step's input and output, {CHARACTERS_PER_TOKEN} to a "
    "token; models and prices are made up"
)


@dataclass(frozen=True, slots=True)
class Model:
    """A made-up model.

    Attributes:
        name: its name.
        per_token_in: price of an input token.
        per_token_cached: price of an input token that is read from the provider's cache.
        per_token_out: price of an output token.
    """

    name: str
    per_token_in: float
    per_token_cached: float
    per_token_out: float


SMALL = Model("demo-small", 0.25e-6, 0.025e-6, 2e-6)
LARGE = Model("demo-large", 3e-6, 0.3e-6, 15e-6)
MODELS = {"reader": SMALL, "critic": LARGE, "librarian": SMALL, "summariser": LARGE}
"""Agent -> its model."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """The arguments of `record_llm` for one step."""

    model: str
    tokens_in: int
    tokens_cached_in: int
    tokens_out: int
    cost: float


def call_of(agent: str, given: Iterable[object], result: object, *, from_cache: bool) -> ModelCall:
    """Return a step as a model call.

    Args:
        agent: the agent of the step.
        given: the input of the step.
        result: the output of the step.
        from_cache: whether the output came from a cache.
    """
    model = MODELS[agent]
    tokens_in = ceil(_characters(given) / CHARACTERS_PER_TOKEN)
    tokens_out = ceil(len(repr(result)) / CHARACTERS_PER_TOKEN)
    cached = tokens_in if from_cache else 0
    cost = (
        (tokens_in - cached) * model.per_token_in + cached * model.per_token_cached + tokens_out * model.per_token_out
    )
    return ModelCall(model.name, tokens_in, cached, tokens_out, cost)


def _characters(given: Iterable[object]) -> int:
    return sum(len(each.decode(errors="replace")) if isinstance(each, bytes) else len(repr(each)) for each in given)
