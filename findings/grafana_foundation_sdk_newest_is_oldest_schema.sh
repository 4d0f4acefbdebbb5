#!/usr/bin/env bash
# grafana-foundation-sdk: the epoch of a version is the time of its build, and each build publishes the schemas of all
# Grafana versions, the oldest one last. So "pip install grafana-foundation-sdk" takes the schema of Grafana 10.1, and
# so does any ">=" requirement, also one that names the schema of 11.6.
# Seen: "grafana-foundation-sdk>=1769699379!11.6.0 installs 10.1.0".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'grafana-foundation-sdk>=1769699379!11.6.0'
version=$("$folder/venv/bin/python" -c 'from importlib.metadata import version; print(version("grafana-foundation-sdk"))')
echo "grafana-foundation-sdk>=1769699379!11.6.0 installs ${version#*!}"
[ "${version#*!}" = "10.1.0" ]
