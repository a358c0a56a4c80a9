"""Reasons why jobs of a model are not batched, in words, each with its remedy."""

from collections.abc import Mapping
from enum import Enum
from typing import Final

from msgspec import Struct

_FORCE: Final = "`batching.enabled = true` batches jobs all the same"
_ROUNDING: Final = (
    "if that is rounding of unrealistic numbers, give several rows in `example` in "
    f"model.toml; {_FORCE}"
)
_EXPORT: Final = "export it with a dynamic first dimension"
_ROWS: Final = "export it so that this output has a row for each row of the input"
_LEAVE_OUT: Final = "keep only other outputs, with `outputs` in model.toml"


class Obstacle(Enum):
    """The reasons why jobs are not batched.

    Each has a description, a remedy, and sometimes another remedy for a model with only one output.
    """

    ASKED = "model.toml says so", "without `batching.enabled = false` it is probed"
    NO_INPUT = "the model takes no input", "export it with an input that has rows"
    SCALAR = "`{name}` is a scalar", _EXPORT
    FIXED = "{where} of `{name}` is fixed at {size}", _EXPORT
    OTHER_OPEN = (
        "{where} of `{name}` is fixed at {size}",
        f"{_EXPORT}, or, if dimension {{open}} counts rows, set `batching.axis = {{open}}` in "
        "model.toml",
    )
    ANY_RANK = (
        "`{name}` may have any number of dimensions",
        "export it with a shape whose first dimension is dynamic",
    )
    DYNAMIC = (
        "{operator} computes with a number that depends on all rows of a run, such as their "
        "maximum, so that a row's result depends on the rows beside it",
        f"{_FORCE}; if other outputs do not depend on it, {_LEAVE_OUT}",
        _FORCE,
    )
    UNREAD = "its graph is too large to be searched for operators that mix rows", _FORCE
    SLOW = (
        "probing took longer than {seconds:g} s",
        "if rows do not depend on each other, `batching.enabled = true` in model.toml batches jobs "
        "without a probe",
    )
    NONE_RAN = (
        "no probe row could be run: {failure}",
        "give several rows in `example` in model.toml",
    )
    NONE_RAN_LIKE_EXAMPLE = (
        "no probe row could be run, nor any row of the `example`: {failure}",
        "give several rows in `example` in model.toml that the model accepts one by one",
    )
    FAILED_TOGETHER = (
        "rows that ran alone failed together: {failure}",
        "export it without a fixed number of rows within the graph, or say which axis counts rows "
        "with `batching.axis` in model.toml",
    )
    NO_ROWS = (
        "no output has a row for each row of the input",
        "export it with one that has, or, if another axis counts rows, say which with "
        "`batching.axis` in model.toml",
    )
    ONE_ANSWER = (
        "all probe rows got the same result, which proves nothing",
        "give several rows in `example` in model.toml that get different results",
    )
    ONE_VALUE = (
        "`{name}` was the same in all probe rows, which proves nothing",
        "give several rows in `example` in model.toml that differ in it",
    )
    UNSTEADY = "`{name}` does not always have its rows along the same axis", _LEAVE_OUT, _ROWS
    MIXES = (
        "`{name}` gives a row another result when other rows are beside it",
        f"{_ROUNDING}; if other outputs do not, {_LEAVE_OUT}",
        _ROUNDING,
    )
    UNSTEADY_NUMBERS = (
        "`{name}` gives the same rows other numbers in each run",
        f"export it for inference, without dropout or random numbers; {_FORCE}",
    )
    RANK = "`{name}` changes its rank with the number of rows", _LEAVE_OUT, _ROWS
    SHAPE = "`{name}` changes its shape with the number of rows", _LEAVE_OUT, _ROWS
    COUNT = "`{name}` has another number of rows than the input", _LEAVE_OUT, _ROWS

    def __init__(self, description: str, remedy: str, remedy_of_only_output: str = "") -> None:
        self.description = description
        self.remedy = remedy
        self.remedy_of_only_output = remedy_of_only_output or remedy


class Reason(Struct, frozen=True):
    """A reason for one model; `named` fills in its text."""

    obstacle: Obstacle
    values: Mapping[str, object] = {}

    @property
    def description(self) -> str:
        """The description with its names filled in, without the remedy."""
        return self.obstacle.description.format_map(self.values)

    def text(self, outputs: int) -> str:
        """The text with its remedy, for a model with this number of outputs.

        It begins with `off:`.
        """
        remedy = self.obstacle.remedy_of_only_output if outputs == 1 else self.obstacle.remedy
        return f"off: {self.description}; {remedy.format_map(self.values)}"
