"""What a person is shown of a bench."""

from collections.abc import Iterator, Sequence

from asyncinfer.cli.bench.verdict import Bench, Load, Sides
from asyncinfer.cli.output import console, show, show_facts, styled

_COLUMNS = ("LOAD", "REQUESTS", "PER SECOND", "p50 ms", "p95 ms", "p99 ms", "FULL", "ERRORS")


def show_bench(found: Bench) -> None:
    to = console()
    to.print(f"{found.model}, {found.connections} connections\n", soft_wrap=True)
    show(
        _COLUMNS, [_row("waits", found.waits), _row("submits", found.submits)], numeric=_COLUMNS[1:]
    )
    to.print()
    show_facts(_facts(found.sides))
    limit = styled("\nlimited by  ", "bold")
    limit.append(found.verdict.side, "bold cyan").append(f": {found.verdict.because}")
    to.print(limit, soft_wrap=True)
    to.print(f"to change   {found.verdict.change}", soft_wrap=True)


def _row(name: str, load: Load) -> Sequence[object]:
    times = load.latency_ms
    return (
        name,
        f"{load.requests:,}",
        f"{load.per_second:,.0f}",
        *(f"{one:.1f}" for one in (times.p50, times.p95, times.p99)),
        load.refused_full,
        load.errors,
    )


def _facts(sides: Sides) -> Iterator[Sequence[object]]:
    """Of the waits; the parts overlap, and need not add up to the whole."""
    yield "this program", f"{sides.client_cpu:.0%} of a core"
    if sides.machine_cpu is not None:
        yield "this machine", f"{sides.machine_cpu:.0%} of all cores, the service among it"
    yield "API", f"{sides.api_ms:.1f} ms for an answer that needs nothing"
    yield "Redis", f"{sides.redis_ms:.1f} ms more for one that asks it"
    yield "queue", _ms(sides.queue_ms, "from due to started, the median")
    yield "run", _ms(sides.run_ms, "from started to ended, the median")
    busy = "" if sides.slots_busy is None else f", {sides.slots_busy:.0%} busy"
    yield "workers", f"{sides.workers}, {sides.slots} slots{busy}"
    if sides.run_times:
        times = ", ".join(f"{rows} rows {took:.1f} ms" for rows, took in sides.run_times.items())
        yield "a run", times


def _ms(value: float | None, what: str) -> str | None:
    return None if value is None else f"{value:.1f} ms {what}"
