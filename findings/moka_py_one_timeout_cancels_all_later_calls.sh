#!/usr/bin/env bash
# moka-py 0.5.0: cached(wait_concurrent=True) on an async function keeps the task of the first call in the cache. If
# that call is cancelled, as by a timeout of its caller, the task is cancelled, too, and stays in the cache: each later
# call with the same argument raises CancelledError, without a new attempt, until the entry leaves the cache, by default
# never. Without wait_concurrent the second call computes the value.
# Seen: "wait_concurrent: TimeoutError, CancelledError, CancelledError (1 attempt); without: TimeoutError, 7, 7 (2)".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet moka-py==0.5.0
seen=$("$folder/venv/bin/python" - <<'PY'
import asyncio

import moka_py


async def three_calls(**options):
    attempts = []

    @moka_py.cached(**options)
    async def load(number):
        attempts.append(number)
        if len(attempts) == 1:
            await asyncio.sleep(60)
        return number

    async def call(timeout):
        try:
            return str(await asyncio.wait_for(load(7), timeout))
        except (TimeoutError, asyncio.TimeoutError):
            return "TimeoutError"
        except asyncio.CancelledError:
            return "CancelledError"

    results = [await call(0.1), await call(10), await call(10)]
    return ", ".join(results), len(attempts)


together, attempts = asyncio.run(three_calls(wait_concurrent=True))
alone, others = asyncio.run(three_calls())
print(f"wait_concurrent: {together} ({attempts} attempt); without: {alone} ({others})")
PY
)
echo "moka-py 0.5.0: $seen"
[ "$seen" = \
  "wait_concurrent: TimeoutError, CancelledError, CancelledError (1 attempt); without: TimeoutError, 7, 7 (2)" ]
