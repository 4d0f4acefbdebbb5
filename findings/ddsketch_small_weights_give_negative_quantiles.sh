#!/usr/bin/env bash
# ddsketch 3.0.1: add(value, weight) takes any positive weight. While the total weight is below one, the rank of a
# quantile above 0 is negative, and the sketch looks it up among its negative values, of which there are none: the
# answer is -0.99, whatever was added. All values below are 50 or more, and the documented error is 1 %.
# Seen: "weight 1: 49.9, 100, 150; weight 0.1: 49.9, -0.99, -0.99" for the quantiles 0, 0.5 and 1.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ddsketch==3.0.1
seen=$("$folder/venv/bin/python" - <<'PY'
from ddsketch import DDSketch


def quantiles(weight):
    sketch = DDSketch(0.01)
    for value in (50, 100, 150):
        sketch.add(value, weight)
    return ", ".join(f"{sketch.get_quantile_value(share):.3g}" for share in (0, 0.5, 1))


print(f"weight 1: {quantiles(1)}; weight 0.1: {quantiles(0.1)}")
PY
)
echo "ddsketch 3.0.1: $seen"
[ "$seen" = "weight 1: 49.9, 100, 150; weight 0.1: 49.9, -0.99, -0.99" ]
