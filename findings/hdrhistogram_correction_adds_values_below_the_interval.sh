#!/usr/bin/env bash
# hdrhistogram 0.10.8: record_corrected_value(value, interval) adds the samples that a stalled client could not take:
# for 2020 with an interval of 1000 that is 1020. The HdrHistogram of Java and C, of which this is a port, stop as soon
# as the rest is shorter than the interval. This one also records the rest, here 20. So each value slightly above the
# interval adds a fast request that never happened, and spoils the minimum and the low percentiles.
# Seen: "1010 -> 10, 1010; 2020 -> 20, 1020, 2020" with expected "1010" and "1020, 2020".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hdrhistogram==0.10.8
seen=$("$folder/venv/bin/python" - <<'PY'
from hdrh.histogram import HdrHistogram


def recorded(value):
    histogram = HdrHistogram(1, 3_600_000, 3)
    assert histogram.record_corrected_value(value, 1000)
    found = [step.value_iterated_to for step in histogram.get_recorded_iterator()]
    return f"{value} -> {', '.join(str(number) for number in found)}"


print(recorded(1010), recorded(2020), sep="; ")
PY
)
echo "hdrhistogram 0.10.8, corrected with an interval of 1000: $seen"
[ "$seen" = "1010 -> 10, 1010; 2020 -> 20, 1020, 2020" ]
