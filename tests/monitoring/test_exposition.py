"""The text format of Prometheus, read back by the parser of its official client."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncinfer.monitoring.counts import MAX_SERIES, OTHER, Counts, Histograms, Labels
from asyncinfer.monitoring.exposition import Family, counter, gauge, histogram, info, write_text
from asyncinfer.monitoring.figures import Figures, decode_figures, encode_figures
from asyncinfer.monitoring.histogram import SECONDS, Histogram
from tests.metrics import Scrape, promtool

VALUES = st.floats(min_value=0, max_value=1e6)


def read(*families: Family) -> Scrape:
    return Scrape(write_text(families).decode())


@settings(max_examples=30)
@given(st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=5))
def test_any_label_and_any_number_is_read_back(values: dict[str, float]) -> None:
    written: dict[Labels, float] = {
        (label.encode("utf-8", "replace").decode(),): n for label, n in values.items()
    }
    found = read(gauge("size", "A help\nof two lines, with \\.", ("name",), written))
    assert {next(iter(labels))[1]: value for (_, labels), value in found.values.items()} == {
        label: value for (label,), value in written.items()
    }


@settings(max_examples=30)
@given(st.lists(VALUES, max_size=50))
def test_a_histogram_counts_each_value_up_to_its_bound(values: list[float]) -> None:
    one = Histogram.of(SECONDS)
    for value in values:
        one.observe(value)
    found = read(histogram("run_seconds", "Runs.", ("model",), {("iris",): one}))
    for bound in (*SECONDS, math.inf):
        le = "+Inf" if bound == math.inf else f"{bound:g}"
        below = sum(value <= bound for value in values)
        assert found("run_seconds_bucket", model="iris", le=le) == below
    assert found("run_seconds_count", model="iris") == len(values)
    assert found("run_seconds_sum", model="iris") == pytest.approx(sum(values))
    assert found.types == {"run_seconds": "histogram"}


def test_a_histogram_without_labels_and_an_info_are_read_back() -> None:
    one = Histogram.of((1.0,))
    one.observe(0.5)
    found = read(
        histogram("run_seconds", "Runs.", (), {(): one}),
        info("build", "The release.", ("version",), [("1.0",)]),
        counter("jobs", "Jobs.", (), {(): 3}),
    )
    assert found("run_seconds_bucket", le="1") == 1
    assert found("build_info", version="1.0") == 1
    assert found("jobs_total") == 3


@pytest.mark.system("promtool")
def test_promtool_accepts_labels_of_any_kind() -> None:
    labels: dict[Labels, float] = {('quote " \\ \n end', "ä"): 1.0, ("", "(other)"): math.inf}
    promtool("check", "metrics", text=read(gauge("size", "Help.", ("a", "b"), labels)).text)


def test_labels_beyond_the_bound_share_one_series() -> None:
    counts, histograms = Counts(), Histograms(SECONDS)
    for number in range(MAX_SERIES + 500):
        counts.add((f"model-{number}", "failed"))
        histograms.observe((f"model-{number}",), 0.1)
    assert len(counts) == len(histograms) == MAX_SERIES + 1
    assert counts[OTHER, OTHER] == sum(histograms[OTHER,].counts) == 500
    counts.add(("model-0", "failed"))
    assert counts["model-0", "failed"] == 2


def test_figures_of_processes_are_added_within_the_bound() -> None:
    total = Figures()
    for process in range(3):
        one = Histogram.of(SECONDS)
        one.observe(0.1)
        submits: dict[Labels, float] = {("iris",): 2}
        submits |= {(f"{process}-{number}",): 1 for number in range(600)}
        sent = Figures(
            counts={"submits": submits},
            histograms={"seconds": {("GET", "/jobs"): one}},
            gauges={"waits": {(): process}},
        )
        total.add(decode_figures(encode_figures(sent)))
    summed = total.counts["submits"]
    assert summed["iris",] == 6
    assert sum(summed.values()) == 1806
    assert len(summed) == MAX_SERIES + 1
    assert total.gauges == {"waits": {(): 3}}
    assert sum(total.histograms["seconds"]["GET", "/jobs"].counts) == 3
