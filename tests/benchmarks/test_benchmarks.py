"""The benchmark: the table of figures with their budgets, and a quick run."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.benchmarks import report
from tests.process import REPOSITORY


def test_a_figure_is_shown_with_its_range_its_ratio_and_its_budget() -> None:
    ours = {"submit_per_second": [9000.0, 10_000.0, 8000.0], "rss_api_mib": [80.0]}
    plain = {"submit_per_second": [1000.0, 900.0, 1100.0]}

    _, _, submits, rss = report.table(report.rows(ours, plain)).splitlines()

    assert submits == (
        "| submit per second | 9,000 (8,000 to 10,000) | 1,000 (900 to 1,100) "
        "| 9.00x | at least 10x: missed |"
    )
    assert rss == "| rss api mib | 80.00 |  |  | at most 70: missed |"


@pytest.mark.soak
def test_a_quick_run_measures_both_systems(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    only = ("--only", "submit", "done", "single", "start")
    command = (sys.executable, "-m", "tests.benchmarks", "--quick", "--rounds", "1", *only)
    subprocess.run([*command, "--json", str(figures)], cwd=REPOSITORY, check=True, timeout=120)

    measured = msgspec.json.decode(figures.read_bytes())

    for system in ("asyncinfer", "plain"):
        assert measured[system]["done_per_second"][0] > 0
        # The client must not be the bottleneck.
        assert max(measured[system]["submit_client_cores"]) < 0.8
    assert 0 < measured["asyncinfer"]["start_to_first_result_seconds"][0] < 30
