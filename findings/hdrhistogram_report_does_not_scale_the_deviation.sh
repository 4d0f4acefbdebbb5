#!/usr/bin/env bash
# hdrhistogram 0.10.8: output_percentile_distribution() takes a ratio that converts the values, here from nanoseconds to
# milliseconds. It divides the values, the mean and the maximum by it, but not the standard deviation, which stands in
# the same line as the mean. The Java library divides both.
# Seen: for 100, 200 and 300 ms, "#[Mean = 199.983, StdDeviation = 81669518.576]" with expected 81.670.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hdrhistogram==0.10.8
seen=$("$folder/venv/bin/python" - <<'PY'
import io

from hdrh.histogram import HdrHistogram

histogram = HdrHistogram(1, 3_600_000_000_000, 3)
for milliseconds in (100, 200, 300):
    histogram.record_value(milliseconds * 1_000_000)
report = io.BytesIO()
histogram.output_percentile_distribution(report, 1_000_000.0)
(line,) = [line for line in report.getvalue().decode().splitlines() if "Mean" in line]
print(" ".join(line.split()))
PY
)
echo "hdrhistogram 0.10.8: $seen"
[ "$seen" = "#[Mean = 199.983, StdDeviation = 81669518.576]" ]
