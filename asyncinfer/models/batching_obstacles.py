"""Why jobs of a model do not share a run, and what would change that, in words."""

from collections.abc import Mapping
from enum import Enum
from typing import Final

from msgspec import Struct

_FORCE: Final = "`batching.enabled = true` shares runs all the same"
_ROUNDING: Final = (
    "if that is rounding, of numbers that nobody sends, give several rows in `example` in "
    f"model.toml; {_FORCE}"
)
_EXPORT: Final = "export it with a first dimension that is open"
_ROWS: Final = "export it so that this output has a row for each row of the input"
_LEAVE_OUT: Final = "keep other outputs alone with `outputs` in model.toml"


class Off(Enum):
    """What is the case; what would change it; and that for the only output of a model, where it
    is something else."""

    ASKED = "model.toml says so", "without `batching.enabled = false` it is tried out"
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
        "export it with a shape whose first dimension is open",
    )
    DYNAMIC = (
        "{operator} computes with a number that all rows of a run have a part in, such as the "
        "largest of all, so that a row's answer depends on the rows beside it",
        f"{_FORCE}; if other outputs do not depend on it, {_LEAVE_OUT}",
        _FORCE,
    )
    UNREAD = "its graph is too large to be searched for operators that mix rows", _FORCE
    SLOW = (
        "probing took longer than {seconds:g} s",
        "if rows do not depend on each other, `batching.enabled = true` in model.toml shares runs "
        "without a probe",
    )
    NONE_RAN = (
        "no probe row could be run: {failure}",
        "give several rows in `example` in model.toml",
    )
    NONE_RAN_LIKE_EXAMPLE = (
        "no probe row could be run, those of the `example` neither: {failure}",
        "give several rows in `example` in model.toml that the model takes one by one",
    )
    FAILED_TOGETHER = (
        "rows that ran alone failed together: {failure}",
        "export it without a number of rows that is fixed within the graph, or say which axis "
        "counts rows with `batching.axis` in model.toml",
    )
    NO_ROWS = (
        "no output has a row for each row of the input",
        "export it with one that has, or, if another axis counts rows, say which with "
        "`batching.axis` in model.toml",
    )
    ONE_ANSWER = (
        "all probe rows got one answer, which proves nothing",
        "give several rows in `example` in model.toml that get different answers",
    )
    ONE_VALUE = (
        "`{name}` was the same in all probe rows, which proves nothing",
        "give several rows in `example` in model.toml that differ in it",
    )
    UNSTEADY = "`{name}` has its rows now here, now there", _LEAVE_OUT, _ROWS
    MIXES = (
        "`{name}` gives a row another answer when other rows are beside it",
        f"{_ROUNDING}; if other outputs do not, {_LEAVE_OUT}",
        _ROUNDING,
    )
    UNSTEADY_NUMBERS = (
        "`{name}` gives the same rows other numbers each time they are run",
        f"export it for inference, without dropout or random numbers; {_FORCE}",
    )
    RANK = "`{name}` changes its rank with the number of rows", _LEAVE_OUT, _ROWS
    SHAPE = "`{name}` changes its shape with the number of rows", _LEAVE_OUT, _ROWS
    COUNT = "`{name}` has another number of rows than the input", _LEAVE_OUT, _ROWS

    def __init__(self, what: str, remedy: str, for_only_output: str = "") -> None:
        self.what = what
        self.remedy = remedy
        self.for_only_output = for_only_output or remedy


class Reason(Struct, frozen=True):
    """One of them, for one model."""

    off: Off
    named: Mapping[str, object] = {}

    @property
    def what(self) -> str:
        return self.off.what.format_map(self.named)

    def words(self, outputs: int) -> str:
        """For a model of so many outputs."""
        remedy = self.off.for_only_output if outputs == 1 else self.off.remedy
        return f"off: {self.what}; {remedy.format_map(self.named)}"
