"""Runs one engine and the checks of features asked for, and prints what each said, as JSON after a marker.

python -m tests.e2e.parity '{"model": PATH, "tp": 1, "pp": 2, "folder": PATH, "features": ["tokens"], ...}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from typing import Any

from tests.e2e.generate import MARKER


async def run_checks(options: dict[str, Any]) -> dict[str, Any]:
    from tests.e2e.parity import control, text
    from tests.e2e.parity.engine import start

    checks = {check.__name__: check for check in (*text.CHECKS, *control.CHECKS)}
    engine = start(options)
    found: dict[str, str] = {}
    seconds: dict[str, float] = {}
    try:
        await engine.workers("watch_batches")
        for name in options["features"]:
            started = time.monotonic()
            try:
                await checks[name](engine)
                found[name] = "ok"
            except Exception:  # noqa: BLE001 - a feature that fails is a result
                found[name] = traceback.format_exc()
            seconds[name] = round(time.monotonic() - started, 1)
    finally:
        engine.llm.shutdown()
    return {"features": found, "remarks": engine.remarks, "seconds": seconds}


def main(options: dict[str, Any]) -> dict[str, Any]:
    import ray

    ray.init(address="auto", runtime_env={"env_vars": options["runtime_env"]})
    try:
        return asyncio.run(run_checks(options))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(MARKER + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
