"""The names of the exported metrics in OpenTelemetry: one table.

Names that begin with ``gen_ai`` come from the semantic conventions for generative AI, as of July 2026:
https://github.com/open-telemetry/semantic-conventions-genai (docs/gen-ai). These conventions are in development. If
they change a name, only this table must change. They have no names for the other metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agentperf_redis.export import families
from agentperf_redis.export.families import FAMILIES, Family

ATTRIBUTES = {"agent": "gen_ai.agent.name", "model": "gen_ai.request.model", "error_type": "error.type"}
"""Label -> attribute. Other labels have the prefix ``agentperf.``."""


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a metric.

    Attributes:
        name: the name.
        unit: its unit, in UCUM.
        fixed: attributes that all its points have.
        without: labels that do not become attributes, because the name contains their value.
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


def _tokens(name: str) -> Name:
    return Name(f"{_USAGE}.{name}", "{token}", _MODALITY, without=("type",))


def _own(family: Family) -> Names:
    """Return the name of a family for which the conventions have none, such as ``agentperf.cache.bytes``."""
    _, subject, rest = family.name.split("_", 2)
    unit = {"seconds": "s", "bytes": "By"}.get(family.unit, "1")
    return Names({"": Name(f"agentperf.{subject}.{rest}", unit)})


_CONVENTIONS: dict[Family, Names] = {
    families.DURATIONS: Names({"": Name("gen_ai.invoke_agent.duration", "s", _INVOKED)}),
    families.TOKENS: Names({"input": _tokens("input_tokens"), "output": _tokens("output_tokens")}),
    families.TOKEN_PARTS: Names(
        {
            "cache_read": _tokens("cache_read.input_tokens"),
            "cache_write": _tokens("cache_write.input_tokens"),
            "reasoning": _tokens("reasoning.output_tokens"),
        }
    ),
}

NAMES: dict[Family, Names] = {
    family: _CONVENTIONS.get(family) or _own(family) for family in FAMILIES if family not in families.STATUS
}
