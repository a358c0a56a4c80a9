"""`python -m tests.benchmarks`: measures both systems in alternation, and prints a table."""

import argparse
import platform
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec

from tests.benchmarks import models, report
from tests.benchmarks.measures import ALONE, PAIRED, Paired
from tests.benchmarks.scale import FULL, QUICK, Figures, Workspace
from tests.benchmarks.systems import Plain, Service, System, running

_NAMES = [*PAIRED, *ALONE]
_README = Path(__file__).parent / "README.md"
Rounds = dict[str, list[float]]
_BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)


def main() -> None:
    arguments = _arguments()
    ours, plain = anyio.run(_measure, arguments)
    text = report.table(report.rows(ours, plain))
    sys.stdout.write(f"\n{text}")
    if arguments.json:
        record = {"machine": _machine(), "asyncinfer": ours, "plain": plain}
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    if arguments.write_readme:
        block = f"{_machine()}; {arguments.rounds} rounds.\n\n{text}"
        page = _BLOCK.sub(lambda match: f"{match[1]}{block}{match[2]}", _README.read_text())
        _README.write_text(page)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests and jobs, one round")
    parser.add_argument("--rounds", type=int, default=0, help="default: 7; 1 with --quick")
    parser.add_argument("--only", nargs="+", choices=_NAMES, default=_NAMES)
    parser.add_argument("--json", type=Path, help="a file to write all figures to")
    parser.add_argument(
        "--write-readme", action="store_true", help="write the table into README.md"
    )
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 7)
    return arguments


async def _measure(arguments: argparse.Namespace) -> tuple[Rounds, Rounds]:
    figures: dict[type[System], Rounds] = {Service: defaultdict(list), Plain: defaultdict(list)}

    def record(kind: type[System], new_figures: Figures) -> None:
        for figure, value in new_figures.items():
            figures[kind][figure].append(value)
            sys.stderr.write(f"{kind.__name__} {figure} {value:.4g}\n")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.place(folder / "models")
        workspace = Workspace(folder, folder / "models", QUICK if arguments.quick else FULL)
        for measure in arguments.only:
            for paired in PAIRED.get(measure, ()):
                await _alternate(paired, workspace, arguments.rounds, record)
            if alone := ALONE.get(measure):
                for _ in range(1 if measure == "growth" else arguments.rounds):
                    record(Service, await alone(workspace))
    return figures[Service], figures[Plain]


async def _alternate(
    paired: Paired,
    workspace: Workspace,
    rounds: int,
    record: Callable[[type[System], Figures], None],
) -> None:
    """Measures both running systems in alternation: a machine's speed drifts within seconds."""
    options: Any = {"workers": paired.workers, "model": paired.model}
    async with (
        running(Service, workspace.models, workspace.new_folder(), **options) as ours,
        running(Plain, workspace.models, workspace.new_folder(), **options) as plain,
    ):
        order: list[System] = [ours, plain]
        for _ in range(rounds):
            for system in order:
                record(type(system), await paired.measure(system, workspace))
            order.reverse()


def _machine() -> str:
    with Path("/proc/cpuinfo").open() as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
