"""A table of figures: medians of the rounds, their range, and the ratio to the plain pattern."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct


class Budget(Struct, frozen=True):
    """A bound for a figure, or for its ratio to the plain pattern."""

    of: Literal["ratio", "figure"]
    bound: Literal["least", "most"]
    value: float

    def is_reached(self, figure: float, ratio: float | None) -> bool | None:
        """None if the ratio is not known."""
        value = ratio if self.of == "ratio" else figure
        if value is None:
            return None
        return value >= self.value if self.bound == "least" else value <= self.value

    def text(self) -> str:
        sign = "at least" if self.bound == "least" else "at most"
        return f"{sign} {self.value:g}{'x' if self.of == 'ratio' else ''}"


BUDGETS: Final = {
    "submit_per_second": Budget("ratio", "least", 10),
    "submit_p99_ms": Budget("ratio", "most", 0.13),
    "submit_no_worker_per_second": Budget("ratio", "least", 14),
    "done_per_second": Budget("ratio", "least", 11),
    "drain_iris_1_no_aof_per_second": Budget("ratio", "least", 18),
    "drain_mlp_1_share_of_bare": Budget("figure", "least", 0.5),
    "single_p50_ms": Budget("ratio", "most", 0.46),
    "idle_worker_cpu_percent": Budget("figure", "most", 0.4),
    "rss_worker_mib": Budget("figure", "most", 100),
    "rss_api_mib": Budget("figure", "most", 70),
    "bulk_to_32_connections": Budget("figure", "least", 1.5),
    "bulk_to_one_connection": Budget("figure", "least", 5),
    "image_as_json_api_cpu_to_binary": Budget("figure", "least", 10),
    "image_api_growth_payloads": Budget("figure", "most", 3),
    "image_worker_growth_payloads": Budget("figure", "most", 3),
    "start_to_first_result_seconds": Budget("figure", "most", 1.5),
    "start_of_300_models_to_first_result_seconds": Budget("figure", "most", 2),
}

Rounds = Mapping[str, Sequence[float]]


class Row(Struct, frozen=True):
    name: str
    ours: Sequence[float]
    plain: Sequence[float] = ()

    @property
    def ratio(self) -> float | None:
        """The ratio of the medians; None without a figure of the plain pattern."""
        plain = statistics.median(self.plain) if self.plain else 0.0
        return statistics.median(self.ours) / plain if plain else None


def rows(ours: Rounds, plain: Rounds) -> list[Row]:
    return [Row(name, figures, plain.get(name, ())) for name, figures in ours.items()]


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| figure | asyncinfer | plain pattern | ratio | budget |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row.ratio:.2f}x" if row.ratio is not None else ""
        lines.append(
            f"| {row.name.replace('_', ' ')} | {_median_and_range(row.ours)} "
            f"| {_median_and_range(row.plain)} | {ratio} | {_budget(row)} |"
        )
    return "\n".join(lines) + "\n"


def _budget(row: Row) -> str:
    budget = BUDGETS.get(row.name)
    if budget is None:
        return ""
    is_reached = budget.is_reached(statistics.median(row.ours), row.ratio)
    return f"{budget.text()}: {'reached' if is_reached else 'missed'}"


def _median_and_range(figures: Sequence[float]) -> str:
    if not figures:
        return ""
    median = statistics.median(figures)
    if len(figures) == 1:
        return _number(median)
    return f"{_number(median)} ({_number(min(figures))} to {_number(max(figures))})"


def _number(figure: float) -> str:
    if figure >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.2f}" if figure >= 1 else f"{figure:.3f}"
