#!/usr/bin/env bash
# prometheus-client 0.26.0: its OpenMetrics parser ignores the spans of a native histogram if an offset is negative, and
# keeps the deltas. The first offset is the index of the first bucket, so it is negative when all values are small: below
# 1 at any schema. The library's own writer emits such histograms, and the parser reads them back without buckets.
# Seen: "3:2 -> ((3, 2),); -3:2 -> None".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet prometheus-client==0.26.0
seen=$("$folder/venv/bin/python" - <<'PY'
from prometheus_client.openmetrics.parser import text_string_to_metric_families


def spans(offset):
    value = f"count:3,sum:1.5,schema:4,zero_threshold:0.0,zero_count:0,positive_spans:[{offset}:2],positive_deltas:[1,1]"
    text = "# TYPE a histogram\na {" + value + "}\n# EOF\n"
    (family,) = text_string_to_metric_families(text)
    found = family.samples[0].native_histogram.pos_spans
    return None if found is None else tuple(tuple(span) for span in found)


print(f"3:2 -> {spans(3)}; -3:2 -> {spans(-3)}")
PY
)
echo "$seen"
[ "$seen" = "3:2 -> ((3, 2),); -3:2 -> None" ]
