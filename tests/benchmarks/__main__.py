"""`python -m tests.benchmarks`: measures both systems, turn and turn about, and prints a table."""

import argparse
import platform
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import anyio
import msgspec

from tests.benchmarks import models, report
from tests.benchmarks.measures import FULL, MEASURES, QUICK, Kind, Room
from tests.benchmarks.systems import Plain, Service

_README = Path(__file__).parent / "README.md"
_BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)


def main() -> None:
    arguments = _arguments()
    ours, plain = anyio.run(_rounds, arguments)
    found = report.rows(ours, plain)
    text = report.table(found)
    sys.stdout.write(f"\n{text}")
    if arguments.json:
        record = {"machine": _machine(), "asyncinfer": ours, "plain": plain}
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    if arguments.write_readme:
        block = f"{_machine()}; {arguments.rounds} rounds.\n\n{text}"
        whole = _BLOCK.sub(lambda match: f"{match[1]}{block}{match[2]}", _README.read_text())
        _README.write_text(whole)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, one round")
    parser.add_argument("--rounds", type=int, default=0, help="default: 3; 1 with --quick")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--write-readme", action="store_true", help="put the table there")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    return arguments


async def _rounds(
    arguments: argparse.Namespace,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    figures: dict[Kind, dict[str, list[float]]] = {
        Service: defaultdict(list),
        Plain: defaultdict(list),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.place(folder / "models")
        room = Room(folder, folder / "models", QUICK if arguments.quick else FULL)
        for number in range(arguments.rounds):
            order: list[Kind] = [Service, Plain] if number % 2 == 0 else [Plain, Service]
            for measure in arguments.only:
                for kind in order:
                    found = await MEASURES[measure](kind, room)
                    for figure, value in found.items():
                        figures[kind][figure].append(value)
                        sys.stderr.write(f"{number + 1} {kind.__name__} {figure} {value:.4g}\n")
    return figures[Service], figures[Plain]


def _machine() -> str:
    with Path("/proc/cpuinfo").open() as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
