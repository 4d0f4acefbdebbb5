#!/usr/bin/env bash
# hdrhistogram 0.10.8: a line of its log has the interval's maximum "scaled by" max_value_unit_ratio, printed with six
# decimals. The writer divides with //, so all of them are lost: with the default ratio of 1,000,000, a maximum of
# 0.769 s is logged as 0.000000 and one of 1.999 s as 1.000000. The Java library writes 0.769 and 1.999.
# Seen: "769000 -> 0.000000, 1999000 -> 1.000000".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hdrhistogram==0.10.8
seen=$("$folder/venv/bin/python" - <<'PY'
import io

from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogWriter


def logged(microseconds):
    histogram = HdrHistogram(1, 3_600_000_000, 3)
    histogram.record_value(microseconds)
    file = io.StringIO()
    HistogramLogWriter(file).output_interval_histogram(histogram, 1.0, 2.0)
    return f"{microseconds} -> {file.getvalue().split(',')[2]}"


print(logged(769_000), logged(1_999_000), sep=", ")
PY
)
echo "hdrhistogram 0.10.8, maximum in the log: $seen"
[ "$seen" = "769000 -> 0.000000, 1999000 -> 1.000000" ]
