"""Reads token counts from the results of any model client.

It accepts mappings and objects: the usage itself, a response that holds it, the result of an agent or of a framework, a
row of a batch, an event of a stream, or a list of any of these. The tables here and in
`agentperf_redis.metrics.llm_shapes` match names, not client types, so no client is imported.
`agentperf_redis.metrics.llm_fields` reads the fields of objects.

The names in `_HOLDERS` are from: openai 3.57.0, anthropic 2.14.0, google-genai 3.6.1, cohere 7.3.1, groq 1.7.0,
mistralai 3.7.0, ollama 0.6.3, xai-sdk 1.21.0, litellm 1.110.2, langchain-core 1.8.3, langgraph 1.2.24,
pydantic-ai-slim 2.68.0, openai-agents 0.24.0, dspy 3.4.1, haystack-ai 3.4.1, strands-agents 1.62.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeGuard

from agentperf_redis import arguments
from agentperf_redis.metrics.llm_fields import Fields, is_scalar
from agentperf_redis.metrics.llm_shapes import SHAPES, Count, Counts, Shape, amount, counts, fitting, whole


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage of a model by one call, or by several calls.

    Attributes:
        tokens_in: tokens sent, including those read from or written to the provider's cache.
        tokens_out: tokens received, including reasoning.
        model: name of the model, if the response has it.
        cost: cost, if the response has it.
        tokens_cached_in: the part of `tokens_in` that was read from the provider's cache.
        tokens_cache_write: the part of `tokens_in` that was written to the provider's cache.
        tokens_reasoning: the part of `tokens_out` that was reasoning.
        calls: number of calls.
        differs: whether the response has a total that its parts do not add up to.
        hidden: whether the tokens by which the total exceeds its parts were counted as reasoning that has no field.
    """

    tokens_in: int = 0
    tokens_out: int = 0
    model: str | None = None
    cost: float = 0.0
    tokens_cached_in: int = 0
    tokens_cache_write: int = 0
    tokens_reasoning: int = 0
    calls: int = 1
    differs: bool = False
    hidden: bool = False


SUMMED = ("tokens_in", "tokens_out", "cost", "tokens_cached_in", "tokens_cache_write", "tokens_reasoning", "calls")
"""The fields of a `Usage` that add up."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a response: an event of a stream, or a message of a conversation.

    Attributes:
        id: id of the response; None if the part has none.
        adds: whether the counts of this part are added to those of the earlier parts; otherwise the larger counts
            apply.
        ends: whether this is the last part of the response.
        leads: whether later parts without an id belong to the same response.
    """

    id: str | None
    adds: bool = False
    ends: bool = False
    leads: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """One usage in a response.

    Attributes:
        usage: the counts.
        part: the part of a response that has this usage; None for a whole response.
    """

    usage: Usage
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of reading a response.

    Attributes:
        found: the usages, one per response.
        part: the part of a response that an event without counts represents; None in all other cases.
    """

    found: tuple[Found, ...] = ()
    part: Part | None = None


_ALL, _ONE = True, False
_HOLDERS: dict[str, bool] = {
    "model_usage": _ALL,  # Claude Agent SDK: one usage per model
    "modelUsage": _ALL,
    "usage": _ALL,
    "usage_metadata": _ALL,  # Gemini, LangChain
    "usageMetadata": _ALL,
    "x_groq": _ALL,  # Groq's last chunk
    "token_usage": _ALL,  # LangChain's llm_output, CrewAI, smolagents
    "tokenUsage": _ALL,
    "models_usage": _ALL,  # AutoGen's messages
    "lm_usage": _ALL,
    "_lm_usage": _ALL,  # dspy's Prediction
    "usage_data": _ALL,  # dspy's tracker
    "accumulated_usage": _ALL,  # Strands' EventLoopMetrics
    "context_wrapper": _ALL,  # openai-agents' RunResult
    "llm_output": _ALL,  # LangChain's LLMResult
    "generations": _ONE,  # all generations of a prompt repeat the usage of the prompt
    "replies": _ONE,  # Haystack: each reply repeats the usage
    "meta": _ONE,  # Cohere; Haystack's generators have one `meta` for each reply
    "_meta": _ALL,  # Haystack's ChatMessage
    "response_metadata": _ALL,  # LangChain's AIMessage
    "generation_info": _ALL,
    "metrics": _ALL,  # Strands' AgentResult, Agno
    "_state": _ALL,  # pydantic-ai's AgentRunResult, if its `usage` is a method
    "message": _ALL,  # Anthropic's message_start and batch results, LangChain's ChatGeneration
    "response": _ALL,  # OpenAI's response.completed, batch rows
    "body": _ALL,  # OpenAI's batch rows
    "result": _ALL,  # Anthropic's batch rows
    "interaction": _ALL,  # Gemini's interaction.completed
    "delta": _ALL,  # Cohere's message-end
    "metadata": _ALL,  # Bedrock's stream
    "amazon-bedrock-invocationMetrics": _ALL,
    "data": _ALL,  # Mistral's stream
    "messages": _ALL,  # an agent's state
    "message_history": _ALL,
    "raw_responses": _ALL,  # openai-agents
    "inlined_responses": _ALL,  # Gemini's batches
    "inlinedResponses": _ALL,
    "modelOutput": _ALL,  # Bedrock's batch rows
    "event": _ALL,  # Claude Agent SDK's and Strands' streams
    "chunk": _ALL,  # OpenAI's stream helper
    "results": _ALL,  # watsonx.ai
    "additional_kwargs": _ALL,  # LlamaIndex
    "raw": _ALL,  # LlamaIndex's ChatResponse
    "_raw_response": _ALL,  # instructor
    "_pb": _ALL,  # Google's older protobuf wrappers
    "_proto": _ALL,
    "_result": _ALL,
}
"""Names of fields that hold a usage, in order of precedence: the first field with counts applies. If the field is a
list, all of its items count (`_ALL`), or only the first item with counts (`_ONE`)."""
_METRICS, _INVOCATIONS, _CYCLES = "metrics", "agent_invocations", "cycles"
"""Names of fields in the metrics of Strands. Strands adds up usages over the lifetime of an agent. The last invocation
produced the result, and each of its cycles is a model call."""
_ITERATIONS = "iterations"
_MODEL = (
    "model",
    "model_name",
    "modelVersion",
    "model_version",
    "modelId",
    "model_id",
    "response_model",
    "ai_model_id",
)
_MODEL_KIN = ("response_metadata", "_meta", "meta", "llm_output", "generation_info", "metadata", "response", "_proto")
"""Names of fields next to a usage that may hold an object with the model's name."""
_COST = ("cost", "total_cost", "total_cost_usd", "costUSD", "response_cost", "cost_usd")
"""Names of fields with a cost. Some gateways and frameworks add such a field (OpenRouter, litellm, pydantic-ai,
LangChain, Claude Agent SDK)."""
_TICKS, _TICK = "cost_in_usd_ticks", 1e-10
"""The field in which xAI reports the cost, in ticks, and the value of a tick (xai-sdk 1.21.0, cost.py)."""
_COST_KIN = ("_hidden_params", "cost")
"""Names of fields that may hold an object with the cost: litellm's hidden parameters, and ``cost.total_cost`` of
Perplexity."""
_CALLS = ("requests", "successful_requests")
"""Names of fields with the number of calls in a sum of usages (pydantic-ai, openai-agents, LangChain, CrewAI)."""
_EVENT = ("type", "object", "event_type", "id", "response_id", "responseId", "candidates", "choices")
_FINISH = ("finish_reason", "finishReason")


def _words(shape: Shape) -> Iterator[str]:
    paths = (shape.tokens_in, shape.tokens_out, shape.total, *shape.marks, *shape.more_in)
    for path in (*paths, *shape.cached_in, *shape.cache_write, *shape.reasoning):
        for step in path.split("."):
            yield from filter(None, step.split("+"))


_NAMES = tuple(
    dict.fromkeys((
        *_HOLDERS, *(word for shape in SHAPES for word in _words(shape)), *_MODEL, *_COST, _TICKS, *_COST_KIN,
        *_CALLS, *_EVENT, *_FINISH, _INVOCATIONS, _CYCLES, _ITERATIONS,
    ))
)  # fmt: skip
_COMPONENT_NAMES = frozenset(_MODEL)
"""Known names that may also be names of components: LangChain's agents have a node ``model``."""
_MAX_DEPTH = 10
"""Maximum depth of a search. The deepest known nesting is seven: a graph's update, state, messages, message, metadata,
usage, counts."""
_OBJECT_COST, _SCALAR_COST, _MAX_FRUITLESS = 20, 1, 12_000
"""The cost of an object, the cost of a scalar, and the cost at which a search ends if it has found no counts meanwhile.

So a search ends after 200 consecutive messages without counts, or after 12,000 numbers of a list. The cost of an object
doubles with each level of nesting below a list. So the search of an object that invents its content ends after ten
objects.
"""
_MAX_UNNAMED = 64
"""Maximum number of searched items in a mapping without known names, such as outputs by component or usage by model."""


def read(response: object) -> Reading:
    """Find the usages in a client's result. Never raises.

    Args:
        response: the client's result, or its usage: a mapping, an object, or a list of them.
    """
    try:
        return _Search().read(response)
    except (KeyboardInterrupt, SystemExit):  # from a signal handler
        raise
    except BaseException:  # noqa: BLE001  the object may raise anything; its usage then stays unread
        return Reading()


def read_usage(response: object) -> Usage | None:
    """Return the sum of the usages in a response, or None when there are none.

    Args:
        response: as for `read`.
    """
    return total([each.usage for each in merged(read(response).found)])


def total(usages: list[Usage]) -> Usage | None:
    """Return the sum of usages; None if there are none. The sum has a model only if all usages have that model."""
    if len(usages) <= 1:
        return usages[0] if usages else None
    models = {usage.model for usage in usages}
    return Usage(
        **{name: sum(getattr(usage, name) for usage in usages) for name in SUMMED},
        model=models.pop() if len(models) == 1 else None,
        differs=any(usage.differs for usage in usages),
    )


def merged(found: Sequence[Found]) -> list[Found]:
    """Merge the parts of each response, because one list may contain several parts of the same response."""
    responses: dict[str, int] = {}
    result: list[Found] = []
    latest: str | None = None
    for each in found:
        part = each.part
        key = None if part is None else part.id or (latest if part.leads else None)
        if part is not None and key is not None and key in responses:
            before = result[responses[key]]
            usage = joined(before.usage, each.usage, adds=part.adds)
            # A list with several parts of a response is a stream that was collected, so no further parts follow.
            result[responses[key]] = Found(usage, before.part and replace(before.part, ends=True))
        else:
            result.append(each)
            if part is not None:
                key = key or f"part {len(result)}"
                responses[key] = len(result) - 1
        if part is not None and part.leads:
            latest = None if part.ends else key
    return result


def joined(before: Usage, after: Usage, *, adds: bool) -> Usage:
    """Return the usage of a response after a further part has arrived.

    Args:
        before: the usage of the earlier parts.
        after: the usage of the further part.
        adds: whether the counts are added; otherwise the larger ones apply.
    """

    def combined(name: str) -> Any:
        one, other = getattr(before, name), getattr(after, name)
        return one + other if adds else max(one, other)

    return Usage(
        **{name: combined(name) for name in SUMMED if name != "calls"},
        model=before.model or after.model,
        calls=max(before.calls, after.calls),
        differs=after.differs,
    )


class _Search:
    """One search for usages."""

    def __init__(self) -> None:
        self._fields = Fields(_NAMES)
        self._fruitless = 0
        self._top = _MAX_DEPTH
        self._seen: dict[int, object] = {}
        """Objects, by id, that are being searched or have no usages. Objects may contain each other in a cycle."""

    def read(self, response: object) -> Reading:
        found = self._within(response, _MAX_DEPTH)
        if found:
            return Reading(
                tuple(replace(each, usage=_known(each.usage)) if each.usage.hidden else each for each in found)
            )
        names = self._fields.names(response)
        part = self._part(response, names)
        if part is None and "data" in names:  # Mistral's events have the chunk in `data`
            chunk = self._fields.get(response, "data")
            part = self._part(chunk, self._fields.names(chunk))
        return Reading(part=part)

    def _within(self, source: object, depth: int) -> list[Found]:
        """Return the usages in an object."""
        if depth <= 0 or self._fruitless >= _MAX_FRUITLESS or source is None:
            return []
        if is_scalar(source):
            self._fruitless += _SCALAR_COST
            return []
        if id(source) in self._seen:
            return []
        self._fruitless += _OBJECT_COST << (self._top - depth)
        self._seen[id(source)] = source
        found = self._searched(source, depth)
        if found:
            del self._seen[id(source)]  # if a list contains a response twice, the response counts twice
        return found

    def _searched(self, source: object, depth: int) -> list[Found]:
        names = self._fields.names(source)
        found = self._named(source, names, depth)
        if found:
            return found
        if _is_list(source):
            return self._listed(source, depth)
        if _is_dict(source):
            return self._unnamed(source, depth) if names <= _COMPONENT_NAMES else []
        return self._named(source, self._fields.dynamic_names(source) - names, depth)

    def _listed(self, items: Sequence[object], depth: int) -> list[Found]:
        found: list[Found] = []
        for item in items:
            if self._fruitless >= _MAX_FRUITLESS:
                break
            found += self._item(item, depth - 1)
        return found

    def _item(self, item: object, depth: int) -> list[Found]:
        """Return the usages in an item of a list."""
        top, self._top = self._top, depth
        found = self._within(item, depth)
        self._top = top
        return found

    def _named(self, source: object, names: frozenset[str], depth: int) -> list[Found]:
        if not names:
            return []
        found = self._counts(source, names)
        if not found and _METRICS in names:
            found = self._last_invocation(self._fields.get(source, _METRICS), depth - 1)
        for holder, every in _HOLDERS.items():
            if found or self._fruitless >= _MAX_FRUITLESS:
                break
            if holder in names:
                held = self._fields.get(source, holder)
                found = self._conversation(held, depth) if holder == "messages" else self._held(held, depth, every)
                if found and holder == "llm_output":
                    found = self._by_prompts(found, source, names)
        return [self._completed(each, source, names) for each in found]

    def _held(self, held: object, depth: int, every: bool) -> list[Found]:
        if every or not _is_list(held):
            return self._within(held, depth - 1)
        prompts = held if all(map(_is_list, held)) else [held]  # LangChain has one list of generations for each prompt
        return [each for prompt in prompts for each in self._first(prompt, depth - 2)]

    def _first(self, items: Sequence[object], depth: int) -> list[Found]:
        return next((found for item in items if (found := self._item(item, depth))), [])

    def _by_prompts(self, found: list[Found], source: object, names: frozenset[str]) -> list[Found]:
        """Count one call per prompt, because LangChain's ``llm_output`` is the sum over all prompts."""
        prompts = self._fields.get(source, "generations") if "generations" in names else None
        if len(found) != 1 or not _is_list(prompts) or not all(map(_is_list, prompts)):
            return found
        return [replace(found[0], usage=replace(found[0].usage, calls=max(1, len(prompts))))]

    def _conversation(self, messages: object, depth: int) -> list[Found]:
        """Return the usages of a state's messages, with the message ids, so that no message counts twice."""
        if not _is_list(messages):
            return self._within(messages, depth - 1)
        found = []
        for message in messages:
            identity = self._text(message, self._fields.names(message), ("id",))
            kept = Part(identity) if identity else None
            found += [replace(each, part=kept or each.part) for each in self._item(message, depth - 2)]
        return found

    def _last_invocation(self, metrics: object, depth: int) -> list[Found]:
        if _INVOCATIONS not in self._fields.names(metrics):
            return []
        invocations = self._fields.get(metrics, _INVOCATIONS)
        if not _is_list(invocations) or not invocations:
            return []
        found = self._within(invocations[-1], depth)
        cycles = self._fields.get(invocations[-1], _CYCLES)
        calls = max(1, len(cycles)) if _is_list(cycles) else 1
        return [replace(each, usage=replace(each.usage, calls=calls)) for each in found]

    def _unnamed(self, source: dict[Any, Any], depth: int) -> list[Found]:
        """Search a mapping whose keys are components or models. If a value has counts itself, its key is the model."""
        found: list[Found] = []
        for key, value in islice(dict.items(source), _MAX_UNNAMED):
            entries = value if _is_list(value) else (value,)
            direct = [each for entry in entries for each in self._counts(entry, self._fields.names(entry))]
            if direct and _is_text(key):
                name = arguments.nearest_name(str.__str__(key))
                found += [replace(each, usage=replace(each.usage, model=each.usage.model or name)) for each in direct]
            else:
                found += self._within(value, depth - 1)
        return found

    def _counts(self, source: object, names: frozenset[str]) -> list[Found]:
        """Return the usages if the object itself has counts."""
        for shape in fitting(names):
            read = counts(shape, self._counter(source, names))
            if read is not None:
                self._fruitless = 0
                usages = self._iterations(shape, source, names) or [_usage(read)]
                calls, cost = self._calls(source, names, usages[0]), self._cost(source, names)
                return [Found(replace(usages[0], calls=calls, cost=cost)), *map(Found, usages[1:])]
        return []

    def _iterations(self, shape: Shape, source: object, names: frozenset[str]) -> list[Usage]:
        """Sum up the usages in ``iterations``. Returns a sum for the model's own requests, then one per advisor model.

        The result is empty if the usage does not list its requests.
        """
        entries = self._fields.get(source, _ITERATIONS) if shape.iterations and _ITERATIONS in names else None
        if not _is_list(entries):
            return []
        own: list[Usage] = []
        others: dict[str, list[Usage]] = {}
        for entry in entries:
            fields = self._fields.names(entry)
            read = counts(shape, self._counter(entry, fields))
            if read is None:
                return []
            apart = self._text(entry, fields, ("model",)) if self._text(entry, fields, ("type",)) == _ADVISOR else None
            (others.setdefault(apart, []) if apart else own).append(replace(_usage(read), model=apart))
        sum_ = total(own)
        if sum_ is None:
            return []
        # The usage itself counts the reasoning tokens of all requests. Its `iterations` may lack these counts.
        thoughts = counts(shape, self._counter(source, names))
        reasoning = max(sum_.tokens_reasoning, min(thoughts.reasoning if thoughts else 0, sum_.tokens_out))
        apart_sums = [other for each in others.values() if (other := total(each)) is not None]
        return [replace(sum_, calls=1, tokens_reasoning=reasoning), *apart_sums]

    def _completed(self, found: Found, source: object, names: frozenset[str]) -> Found:
        """Fill in what a usage lacks (model, cost, part) from `source`, the object in which the usage was found."""
        usage = found.usage
        if usage.model is None and (model := self._model(source, names)):
            usage = replace(usage, model=model)
        if not usage.cost and (cost := self._cost(source, names)):
            usage = replace(usage, cost=cost)
        return Found(usage, found.part or self._part(source, names, counted=True))

    def _model(self, source: object, names: frozenset[str]) -> str | None:
        model = self._text(source, names, _MODEL)
        for kin in _MODEL_KIN:
            if model is None and kin in names:
                held = self._fields.get(source, kin)
                if not _is_list(held):
                    model = self._text(held, self._fields.names(held), _MODEL)
        return arguments.nearest_name(model) if model else None

    def _cost(self, source: object, names: frozenset[str]) -> float:
        for name in _COST:
            if name in names and (cost := _amount(self._fields.get(source, name))):
                return cost
        if _TICKS in names:
            return _amount(self._fields.get(source, _TICKS)) * _TICK
        for kin in _COST_KIN:
            if kin in names:
                held = self._fields.get(source, kin)
                inner = self._fields.names(held)
                for name in _COST:
                    if name in inner and (cost := _amount(self._fields.get(held, name))):
                        return cost
        return 0.0

    def _calls(self, source: object, names: frozenset[str], usage: Usage) -> int:
        for name in _CALLS:
            number = self._counter(source, names)(name)
            if number is not None and number < arguments.MAX_COUNT:
                return max(number, 1 if usage.tokens_in or usage.tokens_out else 0)
        return usage.calls

    def _part(self, source: object, names: frozenset[str], *, counted: bool = False) -> Part | None:
        """Return the part of a response that an event or a chunk represents; None for other objects.

        Args:
            source: the object.
            names: its known names.
            counted: whether the object has counts.
        """
        kind = self._text(source, names, ("type", "event_type")) or ""
        if kind in _ANTHROPIC_EVENTS or kind in _COHERE_EVENTS:
            return Part(self._id(source, names, "message"), ends=kind in _LAST_EVENTS, leads=True)
        if kind.startswith("response.") and ("response" in names or kind.endswith((".delta", ".done", ".added"))):
            return Part(self._id(source, names, "response"), ends=kind in _LAST_EVENTS, leads=True)
        if kind == "AIMessageChunk" and (identity := self._text(source, names, ("id",))):
            return Part(identity, adds=True)
        if self._text(source, names, ("object",)) == _CHUNK and (identity := self._text(source, names, ("id",))):
            # The last chunk has token counts, but no choices. This chunk must end the response: a later response may
            # have the same id, because Ollama uses only 999 ids.
            return Part(identity, ends=counted and not ("choices" in names and self._fields.get(source, "choices")))
        if "candidates" in names and (identity := self._text(source, names, ("response_id", "responseId"))):
            return Part(identity, ends=self._finished(self._fields.get(source, "candidates")))
        return None

    def _finished(self, candidates: object) -> bool:
        """Return whether Gemini's candidates are complete: only the last chunk of a stream has a finish reason."""
        if not _is_list(candidates) or not candidates:
            return False
        names = self._fields.names(candidates[0])
        return any(name in names and self._fields.get(candidates[0], name) is not None for name in _FINISH)

    def _id(self, source: object, names: frozenset[str], holder: str) -> str | None:
        if holder in names:
            held = self._fields.get(source, holder)
            if found := self._text(held, self._fields.names(held), ("id",)):
                return found
        return self._text(source, names, ("id", "response_id"))

    def _counter(self, source: object, names: frozenset[str]) -> Count:
        def count(path: str) -> int | None:
            head, dot, rest = path.partition(".")
            if head not in names:
                return None
            value = self._fields.get(source, head)
            if not dot:
                return _whole(value)
            return None if value is None else _whole(self._fields.get(value, rest))

        return count

    def _text(self, source: object, names: frozenset[str], candidates: tuple[str, ...]) -> str | None:
        for name in candidates:
            if name in names:
                value = self._fields.get(source, name)
                if _is_text(value) and value:
                    return str.__str__(value)  # a plain str, even if the value is of a subclass
        return None


_ADVISOR = "advisor_message"
_CHUNK = "chat.completion.chunk"
_ANTHROPIC_EVENTS = frozenset({
    "message_start", "message_delta", "message_stop",
    "content_block_start", "content_block_delta", "content_block_stop",
})  # fmt: skip
_COHERE_EVENTS = frozenset({
    "message-start", "content-start", "content-delta", "content-end", "message-end", "stream-start", "stream-end",
})  # fmt: skip
_LAST_EVENTS = frozenset({
    "message_stop", "message-end", "stream-end", "response.completed", "response.done", "response.failed",
    "response.incomplete",
})  # fmt: skip


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a value really is a list or a tuple: `isinstance` would believe a mock that claims to be one."""
    return issubclass(type(value), (list, tuple))


def _is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return issubclass(type(value), dict)


def _is_text(value: object) -> TypeGuard[str]:
    return issubclass(type(value), str)


def _usage(read: Counts) -> Usage:
    return Usage(
        read.tokens_in,
        read.tokens_out,
        tokens_cached_in=read.cached_in,
        tokens_cache_write=read.cache_write,
        tokens_reasoning=read.reasoning,
        differs=read.differs,
        hidden=read.hidden,
    )


def _known(usage: Usage) -> Usage:
    """Mark a usage with hidden reasoning as inconsistent, unless its vendor is known to hide reasoning."""
    return replace(usage, hidden=False, differs=not (usage.model and _HIDES_REASONING in usage.model.lower()))


_HIDES_REASONING = "gemini"
"""Part of the names of those models that are known to hide reasoning tokens. Gemini's OpenAI endpoint does so; see
ai.google.dev, OpenAI compatibility, 2026-11."""


def _whole(value: object) -> int | None:
    try:
        return whole(value)
    except Exception:  # noqa: BLE001  a value whose conversion raises, such as Decimal("NaN"), is no count
        return None


def _amount(value: object) -> float:
    try:
        return amount(value)
    except Exception:  # noqa: BLE001  as above
        return 0.0
