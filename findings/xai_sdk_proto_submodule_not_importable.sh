#!/usr/bin/env bash
# xai-sdk 1.21.0: xai_sdk.proto chooses its generated modules at run time and adds them only as attributes. So
# "from xai_sdk.proto import usage_pb2" works, while "import xai_sdk.proto.usage_pb2" is a ModuleNotFoundError.
# Seen: "from: SamplingUsage; import: ModuleNotFoundError".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet xai-sdk==1.21.0
seen=$("$folder/venv/bin/python" - <<'PY'
import importlib

from xai_sdk.proto import usage_pb2

try:
    importlib.import_module("xai_sdk.proto.usage_pb2")
    found = "imported"
except ImportError as error:
    found = type(error).__name__
print(f"from: {usage_pb2.SamplingUsage.DESCRIPTOR.name}; import: {found}")
PY
)
echo "$seen"
[ "$seen" = "from: SamplingUsage; import: ModuleNotFoundError" ]
