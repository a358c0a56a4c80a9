"""Validation errors of msgspec as faults with a JSON pointer and a hint."""

import re
from typing import Final

import msgspec
from msgspec import Struct

from asyncinfer.errors import InputError
from asyncinfer.tensors.json_errors import unknown_name_detail

_SHOWN_CHARACTERS: Final = 64
_PLACE: Final = " - at `"
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def fault_of(error: msgspec.ValidationError, struct: type[Struct], under: str = "") -> InputError:
    """Returns the fault of a failed conversion to `struct`, which was expected at the JSON pointer
    `under` of the body. Its pointer names the member that is wrong, unknown or missing."""
    message, place, path = str(error).rpartition(_PLACE)
    if not place:
        message, path = path, ""
    pointer = under + "".join(f"/{name or index}" for name, index in _STEP.findall(path[:-1]))
    if unknown := _UNKNOWN.fullmatch(message):
        name = unknown[1][:_SHOWN_CHARACTERS]
        return InputError(
            f"{pointer}/{_escaped(name)}", unknown_name_detail(name, struct.__struct_fields__)
        )
    if missing := _MISSING.fullmatch(message):
        return InputError(f"{pointer}/{missing[1]}", "This field is required.")
    return InputError(pointer, f"{message}.")


def _escaped(name: str) -> str:
    """A name as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
