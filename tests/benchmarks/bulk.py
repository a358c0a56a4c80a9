"""Many jobs in one request, compared with single requests in alternation."""

import statistics
from collections import defaultdict
from typing import Final

import msgspec

from tests.benchmarks import load
from tests.benchmarks.load import Plan
from tests.benchmarks.scale import Figures, Workspace
from tests.benchmarks.systems import Service, running, until

_LINES: Final = 10_000
_TURNS: Final = 3
_BODY: Final = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


async def bulk(workspace: Workspace) -> Figures:
    """Accepted jobs per second, with the worker running: of one request with 10,000 lines, and of
    single requests over 32 connections and over one."""
    results: dict[str, list[float]] = defaultdict(list)
    async with running(Service, workspace.models, workspace.new_folder(), workers=1) as system:
        single = Plan(port=system.port, how="submit", requests=0, connections=1, body=_BODY)
        plans = {
            "bulk_lines": Plan(
                port=system.port, how="lines", requests=_LINES, connections=1, body=_BODY,
                headers=("Content-Type: application/x-ndjson",),
            ),
            "bulk_32_connections": _changed(single, workspace.scale.requests, connections=32),
            "bulk_one_connection": _changed(single, workspace.scale.requests // 6, connections=1),
        }  # fmt: skip
        for _ in range(_TURNS):
            for name, plan in plans.items():
                results[name].append((await load.run(plan)).per_second)
                await until(lambda: system.redis.llen("predict_queue") == 0, "an empty queue", 60)
    figures = {f"{name}_per_second": statistics.median(rates) for name, rates in results.items()}
    lines = figures["bulk_lines_per_second"]
    figures["bulk_to_32_connections"] = lines / figures["bulk_32_connections_per_second"]
    figures["bulk_to_one_connection"] = lines / figures["bulk_one_connection_per_second"]
    return figures


def _changed(plan: Plan, requests: int, *, connections: int) -> Plan:
    return msgspec.structs.replace(plan, requests=requests, connections=connections)
