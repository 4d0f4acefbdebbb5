"""Reads the text of the Prometheus exporter with prometheus_client's own parsers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain
from prometheus_client.samples import NativeHistogram

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Exposed:
    """The content of a page.

    Attributes:
        kinds: type of each family, by the name of the family in the text.
        values: values by sample name and labels.
        native: native histograms by family name and labels.
    """

    kinds: dict[str, str]
    values: dict[tuple[str, Labels], float]
    native: dict[tuple[str, Labels], NativeHistogram]

    def value(self, name: str, **labels: str) -> float:
        """Return one value."""
        return self.values[name, frozenset(labels.items())]

    def of(self, name: str) -> dict[Labels, float]:
        """Return all values of a name, by labels."""
        return {labels: value for (each, labels), value in self.values.items() if each == name}


def plain(text: str) -> Exposed:
    """Read Prometheus' text format."""
    return _exposed(read_plain(text))


def openmetrics(text: str) -> Exposed:
    """Read OpenMetrics.

    The parser of prometheus_client drops the spans of a native histogram whose first bucket has a negative index; see
    findings/. Before it parses the text, this function adds a large constant to such an index. Afterwards it subtracts
    the constant again.
    """
    raised = re.sub(r"positive_spans:\[(-\d+):", lambda found: f"positive_spans:[{int(found[1]) + _RAISE}:", text)
    found = _exposed(read_openmetrics(raised))  # type: ignore[no-untyped-call]
    for key, histogram in found.native.items():
        if histogram.pos_spans and histogram.pos_spans[0].offset > _RAISE // 2:
            first, *rest = histogram.pos_spans
            found.native[key] = histogram._replace(pos_spans=(first._replace(offset=first.offset - _RAISE), *rest))
    return found


_RAISE = 1_000_000
"""The constant that is added to the index of a bucket. It is more than twice the largest index."""


def native_buckets(histogram: NativeHistogram) -> dict[int, int]:
    """Return the counts of a native histogram by index, without empty buckets."""
    counts: dict[int, int] = {}
    index = count = at = 0
    deltas = list(histogram.pos_deltas or ())
    for offset, length in histogram.pos_spans or ():
        index += offset
        for _ in range(length):
            count += deltas[at]
            counts[index] = count
            index, at = index + 1, at + 1
    assert at == len(deltas)
    return counts


def _exposed(families: Iterable[Metric]) -> Exposed:
    found = Exposed({}, {}, {})
    for family in families:
        assert family.name not in found.kinds, f"{family.name} appears twice"
        found.kinds[family.name] = family.type
        for sample in family.samples:
            key = sample.name, frozenset((sample.labels or {}).items())
            assert key not in found.values, f"{key} appears twice"
            assert key not in found.native, f"{key} appears twice"
            if sample.native_histogram is not None:
                found.native[key] = sample.native_histogram
            else:
                found.values[key] = sample.value
    return found
