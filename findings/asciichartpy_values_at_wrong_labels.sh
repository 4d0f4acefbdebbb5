#!/usr/bin/env bash
# asciichartpy 1.5.25: if the height is not that of the values, the rows of the curve and the labels of the axis are
# scaled differently: values are multiplied by height/interval and rounded from 0, the labels are spread evenly between
# the maximum and the minimum over rows of which there may be more. So the highest value is drawn beside a lower label.
# Seen: the chart of 1 to 10 at height 3 ends at the label 7.75, and the row of 10.00 is empty.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet asciichartpy==1.5.25
chart=$("$folder/venv/bin/python" -c 'import asciichartpy
print(asciichartpy.plot(list(range(1, 11)), {"height": 3}))')
echo "asciichartpy 1.5.25, 1 to 10 at height 3:"
echo "$chart"
[ "$(head -n 2 <<<"$chart" | tr -d ' ')" = "10.00┼
7.75┤╭──" ]
