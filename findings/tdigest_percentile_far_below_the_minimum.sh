#!/usr/bin/env bash
# tdigest 0.5.2.2: TDigest.percentile() extrapolates to the left of the first centroid. If the smallest value is also a
# frequent one, as with latencies rounded to milliseconds, low and middle percentiles come out far below all samples,
# even negative. 100 samples of 10 and one of 1000 have percentiles of 10 from 0 to 99.
# Seen: "p0 10, p1 -950, p10 -772, p25 -475, p50 20, p100 1000".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tdigest==0.5.2.2 accumulation_tree==0.6.4 pyudorandom==1.0.0
seen=$("$folder/venv/bin/python" - <<'PY'
from tdigest import TDigest

digest = TDigest()
digest.batch_update([10] * 100 + [1000])
assert digest.n == 101
print(", ".join(f"p{share} {digest.percentile(share):.0f}" for share in (0, 1, 10, 25, 50, 100)))
PY
)
echo "tdigest 0.5.2.2: $seen"
[ "$seen" = "p0 10, p1 -950, p10 -772, p25 -475, p50 20, p100 1000" ]
