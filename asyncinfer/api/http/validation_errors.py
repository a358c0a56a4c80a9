"""Validation errors of msgspec as faults with a JSON pointer and what is expected there."""

from typing import Any

import msgspec

from asyncinfer.errors import InputError
from asyncinfer.tensors.json_errors import unknown_name_detail
from asyncinfer.untrusted.expectations import SHOWN_CHARACTERS, problem_of


def fault_of(
    error: msgspec.ValidationError, expected: Any, under: str = "", *, is_text: bool = False
) -> InputError:
    """Returns the fault of a failed conversion to the type `expected`, which was expected at the
    JSON pointer `under` of the body. Its pointer names the member that is wrong, unknown or
    missing; its detail says what is allowed there. `is_text` is as for `problem_of`."""
    problem = problem_of(error, expected, is_text=is_text)
    pointer = under + "".join(f"/{step}" for step in problem.steps)
    if problem.unknown is not None:
        name = problem.unknown[:SHOWN_CHARACTERS]
        return InputError(f"{pointer}/{escaped(name)}", unknown_name_detail(name, problem.known))
    if problem.missing is not None:
        return InputError(f"{pointer}/{problem.missing}", "This field is required.")
    return InputError(pointer, problem.detail)


def escaped(name: str) -> str:
    """A name as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
