#!/usr/bin/env bash
# fastdigest 0.12.0: weights may be fractions (its README uses 0.4), and quantiles should not depend on the unit of the
# weights. But quantile() behaves as if one unit of weight were one sample: with weights of 0.02, the quantiles of 1 to
# 100 reach from 25.5 to 75.5 only, though min() and max() are right. Weights that add up to one (0.2, 0.3, 0.5) make
# each quantile NaN.
# Seen: "weight 1: 1.0, 50.5, 100.0; weight 0.02: 25.5, 50.5, 75.5 (min 1, max 100); shares: nan, nan, nan".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fastdigest==0.12.0
seen=$("$folder/venv/bin/python" - <<'PY'
from fastdigest import TDigest


def quantiles(digest):
    return ", ".join(f"{digest.quantile(share):.1f}" for share in (0, 0.5, 1))


values = [float(value) for value in range(1, 101)]
light = TDigest.from_values(values, 0.02)
print(f"weight 1: {quantiles(TDigest.from_values(values, 1.0))}; weight 0.02: {quantiles(light)}", end=" ")
print(f"(min {light.min():g}, max {light.max():g});", end=" ")
print(f"shares: {quantiles(TDigest.from_values([1.0, 2.0, 3.0], [0.2, 0.3, 0.5]))}")
PY
)
echo "fastdigest 0.12.0: $seen"
[ "$seen" = "weight 1: 1.0, 50.5, 100.0; weight 0.02: 25.5, 50.5, 75.5 (min 1, max 100); shares: nan, nan, nan" ]
