"""Reads metrics as Prometheus does, with the parser of its official client, and runs promtool."""

import subprocess
import urllib.request
from collections.abc import Mapping
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families

Series: TypeAlias = tuple[str, frozenset[tuple[str, str]]]


class Scrape:
    """What one scrape has shown."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.types: dict[str, str] = {}
        """By name of the metric; the parser leaves out the `_total` of a counter."""
        self.values: dict[Series, float] = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation, f"{family.name} has no HELP"
            assert family.name not in self.types, f"{family.name} is there twice"
            self.types[family.name] = family.type
            for sample in family.samples:
                series = (sample.name, frozenset(sample.labels.items()))
                assert series not in self.values, f"{series} is there twice"
                self.values[series] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        """The value of a series; 0 if it is not there."""
        return self.values.get((name, frozenset(labels.items())), 0.0)

    @property
    def names(self) -> set[str]:
        """The names of all series."""
        return {name for name, _ in self.values}

    def labels(self, name: str, label: str) -> set[str]:
        """The values of a label of all series of this name."""
        return {dict(labels)[label] for found, labels in self.values if found == name}

    def counters(self) -> Mapping[Series, float]:
        """The series that may only grow."""
        growing = ("_total", "_bucket", "_count", "_sum")
        return {
            series: value for series, value in self.values.items() if series[0].endswith(growing)
        }


def scrape(port: int) -> Scrape:
    """Reads the metrics of a port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return Scrape(answer.read().decode())


def promtool(*arguments: str, text: str = "") -> None:
    """Runs promtool, with `text` as its input; fails the test with its output if it complains. The
    test needs the program."""
    done = subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert not done.stderr, done.stderr
