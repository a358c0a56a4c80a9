"""The report of `bench` for people."""

from collections.abc import Iterator, Sequence

from asyncinfer.cli.bench.verdict import Bench, LoadResult, Sides
from asyncinfer.cli.output import console, counted, show, show_facts, styled

_COLUMNS = ("LOAD", "REQUESTS", "PER SECOND", "p50 ms", "p95 ms", "p99 ms", "FULL", "ERRORS")


def show_bench(bench: Bench) -> None:
    """Prints the measurements and the bottleneck on stdout."""
    target = console()
    target.print(f"{bench.model}, {counted(bench.connections, 'connection')}\n", soft_wrap=True)
    show(
        _COLUMNS, [_row("waits", bench.waits), _row("submits", bench.submits)], numeric=_COLUMNS[1:]
    )
    target.print()
    show_facts(_facts(bench.sides))
    limit = styled("\nlimited by  ", "bold")
    limit.append(bench.verdict.side, "bold cyan").append(f": {bench.verdict.because}")
    target.print(limit, soft_wrap=True)
    target.print(f"to change   {bench.verdict.change}", soft_wrap=True)


def _row(name: str, load: LoadResult) -> Sequence[object]:
    """The cells of a load."""
    times = load.latency_ms
    return (
        name,
        f"{load.requests:,}",
        f"{load.per_second:,.0f}",
        *(f"{ms:.1f}" for ms in (times.p50, times.p95, times.p99)),
        load.refused_full,
        load.errors,
    )


def _facts(sides: Sides) -> Iterator[Sequence[object]]:
    """Pairs of a name and a measurement of the first load; None where it is not known.

    The parts overlap and need not add up to the whole.
    """
    yield "this program", f"{sides.client_cpu:.0%} of a core"
    if sides.machine_cpu is not None:
        yield "this machine", f"{sides.machine_cpu:.0%} of all cores, including the service"
    yield "API", f"{sides.api_ms:.1f} ms for a request that needs no Redis"
    yield "Redis", f"{sides.redis_ms:.1f} ms more for a request that needs it"
    yield "queue", _ms(sides.queue_ms, "from submit to start, the median")
    yield "run", _ms(sides.run_ms, "from start to end, the median")
    busy = "" if sides.slots_busy is None else f", {sides.slots_busy:.0%} busy"
    yield "workers", f"{sides.workers}, {counted(sides.slots, 'slot')}{busy}"
    if sides.run_times:
        times = [f"{counted(int(rows), 'row')} {ms:.1f} ms" for rows, ms in sides.run_times.items()]
        yield "a run", ", ".join(times)


def _ms(value: float | None, meaning: str) -> str | None:
    """A number of milliseconds and what it means, as text; None for None."""
    return None if value is None else f"{value:.1f} ms {meaning}"
