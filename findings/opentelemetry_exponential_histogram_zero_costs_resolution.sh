#!/usr/bin/env bash
# opentelemetry-sdk 1.45.2: an exponential histogram has buckets as fine as fit. If all values between two collections
# are zero, these are given the scale 0, and the cumulative histogram is merged at the smaller scale, for ever: all
# values of the past and the future go to buckets of the width of a power of two. Zeros have no need of a scale, and
# together with other values they do no harm.
# Seen, for 100 to 119: "scale 9, 20 buckets filled", and after a round of one zero, "scale 0, 1 buckets filled".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opentelemetry-sdk==1.45.2
seen=$("$folder/venv/bin/python" - <<'PY'
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation


def collected(rounds):
    reader = InMemoryMetricReader(preferred_aggregation={Histogram: ExponentialBucketHistogramAggregation()})
    histogram = MeterProvider(metric_readers=[reader]).get_meter("m").create_histogram("wait_ms")
    for values in rounds:
        for value in values:
            histogram.record(value)
        (metric,) = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    filled = sum(count > 0 for count in point.positive.bucket_counts)
    return f"scale {point.scale}, {filled} buckets filled, {point.count} values"


values = range(100, 120)
print("zero with the others:", collected([values, [0, *values]]))
print("zero alone in the first round:", collected([[0], values, values]))
print("zero alone in a later round:", collected([values, [0], values]))
PY
)
echo "opentelemetry-sdk 1.45.2:"
echo "$seen"
[ "$seen" = "zero with the others: scale 9, 20 buckets filled, 41 values
zero alone in the first round: scale 0, 1 buckets filled, 41 values
zero alone in a later round: scale 0, 1 buckets filled, 41 values" ]
