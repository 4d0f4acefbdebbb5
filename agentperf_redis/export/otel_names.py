"""The OpenTelemetry names of the exported metrics, and of the span attributes that this library reads.

Names that begin with ``gen_ai`` come from the semantic conventions for generative AI, as of July 2026:
https://github.com/open-telemetry/semantic-conventions-genai (docs/gen-ai). These conventions are in development. If
they change a name, only the tables here must change. The conventions have no names for the metrics whose names here do
not begin with ``gen_ai``.

Instrumentations also use other names. Those in `SPAN_TOKENS` and the tables after it are from:
opentelemetry-semantic-conventions 0.66b2 and opentelemetry-util-genai 1.3b0 (the conventions), pydantic-ai-slim 2.68.0,
opentelemetry-semantic-conventions-ai 0.5.1 (OpenLLMetry, ``traceloop``), openinference-semantic-conventions 0.1.42,
sentry-docs 2025-10 (``gen_ai.usage.input_tokens.cached``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agentperf_redis.export import families
from agentperf_redis.export.families import FAMILIES, Family

TOKENS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read.input_tokens",
    "cache_write": "cache_write.input_tokens",
    "reasoning": "reasoning.output_tokens",
}
"""Type of tokens -> the last part of the name that the conventions give it in metrics and attributes."""

ATTRIBUTES = {"agent": "gen_ai.agent.name", "model": "gen_ai.request.model", "error_type": "error.type"}
"""Label -> attribute. Other labels have the prefix ``agentperf.``."""


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a metric.

    Attributes:
        name: the name.
        unit: its unit, in UCUM.
        fixed: attributes that every point of the metric has.
        without: labels that do not become attributes, because the name of the metric already contains their value.
    """

    name: str
    unit: str
    fixed: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()

    def attributes(self, labels: tuple[str, ...], label_values: tuple[str, ...]) -> dict[str, str]:
        """Return the attributes of a point. A label with an empty value (an unknown model) is left out."""
        own = {
            ATTRIBUTES.get(label, f"agentperf.{label}"): value
            for label, value in zip(labels, label_values, strict=True)
            if value and label not in self.without
        }
        return {**dict(self.fixed), **own}


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a family's samples.

    Attributes:
        by_type: the name for each value of the last label, ``type``. A family without this label has only one name,
            under the key "".
    """

    by_type: dict[str, Name] = field(default_factory=dict)

    def of(self, label_values: tuple[str, ...]) -> Name:
        """Return the name of a sample."""
        only = self.by_type.get("")
        return self.by_type[label_values[-1]] if only is None else only


_INVOKED = (("gen_ai.operation.name", "invoke_agent"),)
_MODALITY = (("gen_ai.token.modality", "unknown"),)
_USAGE = "gen_ai.client.inference.usage"


def _tokens(kind: str) -> Name:
    return Name(f"{_USAGE}.{TOKENS[kind]}", "{token}", _MODALITY, without=("type",))


def _own(family: Family) -> Names:
    """Return the name of a family for which the conventions have none, such as ``agentperf.cache.bytes``."""
    _, subject, rest = family.name.split("_", 2)
    unit = {"seconds": "s", "bytes": "By"}.get(family.unit, "1")
    return Names({"": Name(f"agentperf.{subject}.{rest}", unit)})


_CONVENTIONS: dict[Family, Names] = {
    families.DURATIONS: Names({"": Name("gen_ai.invoke_agent.duration", "s", _INVOKED)}),
    families.TOKENS: Names({"input": _tokens("input"), "output": _tokens("output")}),
    families.TOKEN_PARTS: Names({part: _tokens(part) for part in ("cache_read", "cache_write", "reasoning")}),
}

NAMES: dict[Family, Names] = {
    family: _CONVENTIONS.get(family) or _own(family) for family in FAMILIES if family not in families.STATUS
}

# -- the attributes of spans

OPERATION = "gen_ai.operation.name"

SPAN_TOKENS: dict[str, tuple[str, ...]] = {
    "input_tokens": (
        f"gen_ai.usage.{TOKENS['input']}",
        "gen_ai.usage.prompt_tokens",  # used by the conventions before 1.27 and by OpenLLMetry
        "llm.usage.prompt_tokens",
        "llm.token_count.prompt",  # OpenInference
    ),
    "output_tokens": (
        f"gen_ai.usage.{TOKENS['output']}",
        "gen_ai.usage.completion_tokens",
        "llm.usage.completion_tokens",
        "llm.token_count.completion",
    ),
    "total_tokens": ("gen_ai.usage.total_tokens", "llm.usage.total_tokens", "llm.token_count.total"),
    "cache_read_tokens": (
        f"gen_ai.usage.{TOKENS['cache_read']}",
        "gen_ai.usage.cache_read_input_tokens",  # OpenLLMetry before 0.5
        "gen_ai.usage.details.cache_read_tokens",  # pydantic-ai
        "gen_ai.usage.input_tokens.cached",  # Sentry
        "llm.token_count.prompt_details.cache_read",
    ),
    "cache_write_tokens": (
        f"gen_ai.usage.{TOKENS['cache_write']}",
        "gen_ai.usage.cache_creation.input_tokens",  # the conventions before 2026-07
        "gen_ai.usage.cache_creation_input_tokens",
        "gen_ai.usage.details.cache_write_tokens",
        "gen_ai.usage.input_tokens.cache_write",
        "llm.token_count.prompt_details.cache_write",
    ),
    "reasoning_tokens": (
        f"gen_ai.usage.{TOKENS['reasoning']}",
        "gen_ai.usage.reasoning_tokens",
        "llm.usage.reasoning_tokens",
        "gen_ai.usage.details.reasoning_tokens",
        "gen_ai.usage.output_tokens.reasoning",
        "llm.token_count.completion_details.reasoning",
    ),
}
"""Field of a usage, in the format of pydantic-ai (see `agentperf_redis.metrics.llm_shapes`) -> the attributes with this
count, in order of precedence."""
SPAN_COST = ("operation.cost", "gen_ai.usage.cost", "llm.cost.total")
SPAN_MODEL_REQUESTED = (
    "gen_ai.request.model",
    "llm.request.model_name",
    "llm.model_name",
    "embedding.model_name",
    "traceloop.association.properties.ls_model_name",  # OpenLLMetry, from LangChain's metadata
)
SPAN_MODEL = ("gen_ai.response.model", "llm.response.model_name", *SPAN_MODEL_REQUESTED)
NO_NAMES = ("", "unknown")
"""Values that stand for a missing name: OpenLLMetry writes ``unknown``."""
SPAN_AGENT = ("gen_ai.agent.name", "agent.name")
SPAN_TOOL = ("gen_ai.tool.name", "tool.name", "traceloop.entity.name")
SPAN_STEP = ("gen_ai.workflow.name", "gen_ai.task.name", "traceloop.entity.name")
OPERATIONS = {
    "invoke_agent": "agent",
    "create_agent": "setup",
    "chat": "model",
    "text_completion": "model",
    "generate_content": "model",
    "embeddings": "model",
    "execute_tool": "tool",
}
"""Value of `OPERATION` -> the kind of the span. With any other value, such as ``invoke_workflow``, ``retrieval``,
``plan`` or OpenLLMetry's ``execute_task``, the span is a step."""
SPAN_KINDS: dict[str, dict[str, str]] = {
    OPERATION: {each: each for each in OPERATIONS},
    "openinference.span.kind": {
        "AGENT": "invoke_agent",
        "LLM": "chat",
        "EMBEDDING": "embeddings",
        "TOOL": "execute_tool",
    },
    "llm.request.type": {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"},
    "traceloop.span.kind": {"agent": "invoke_agent", "tool": "execute_tool"},
}
"""The attribute with the kind of a span -> the value of this attribute -> the operation. If a span has several of these
attributes, the first one applies. With any other value, the span is a step."""
LATE_SCOPES = ("openinference.",)
"""Beginnings of names of instrumentation scopes. Their spans get the attribute of `SPAN_KINDS` only at their end."""
