"""What is wrong where msgspec refuses a value, in words that do not speak of Python."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import msgspec
from msgspec import Struct, inspect

SHOWN_CHARACTERS: Final = 64
_PLACE: Final = " - at `"
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_NOT_LISTED = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)
_OTHER_TYPE = re.compile(r"Expected `.*`, got `(\w+)`")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_UNNAMED: Final = "..."
"""The step to a member of an object with any names: msgspec does not say which."""

_TYPE_NAMES: Final = {
    "str": "a string",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
"""msgspec's names of what a value is, in words; `null` stays."""


class Problem(Struct, frozen=True):
    """What is wrong at a place."""

    steps: tuple[str, ...]
    """The names and indices that lead there."""
    detail: str
    """What is allowed there, and what is there; empty for an unknown or missing member."""
    unknown: str | None = None
    """The name of a member that is not allowed; `known` has those that are."""
    known: tuple[str, ...] = ()
    missing: str | None = None
    """The name of a member that is required."""


def problem_of(error: msgspec.ValidationError, expected: Any, *, is_text: bool = False) -> Problem:
    """What was wrong in a failed conversion to the type `expected`. `is_text`: all values were
    strings, as in a query, so that their type says nothing.

    What a pattern allows is said by `extra={"expected": words}` beside it.
    """
    message, place, path = str(error).rpartition(_PLACE)
    if not place:
        message, path = path, ""
    steps = [name or index for name, index in _STEP.findall(path[:-1])]
    found = _type_at(_type_info(expected), steps)
    named = tuple(steps[: steps.index(_UNNAMED)] if _UNNAMED in steps else steps)
    if unknown := _UNKNOWN.fullmatch(message):
        return Problem(named, "", unknown=unknown[1], known=tuple(_names_in(found)))
    if missing := _MISSING.fullmatch(message):
        return Problem(named, "", missing=missing[1])
    if isinstance(found, inspect.AnyType):
        return Problem(named, "A number in it is too large.")
    return Problem(named, f"Expected {_words(found)}{_got(message, found, is_text)}.")


_type_info = cache(inspect.type_info)


def _type_at(expected: inspect.Type, steps: Sequence[str]) -> inspect.Type:
    """The type of what is at these steps in a value of this type."""
    for step in steps:
        for option in _options(expected):
            if isinstance(option, inspect.StructType):
                expected = next(field.type for field in option.fields if field.encode_name == step)
            elif isinstance(option, inspect.ListType | inspect.VarTupleType):
                expected = option.item_type
            elif isinstance(option, inspect.DictType):
                expected = option.value_type
    return expected


def _options(expected: inspect.Type) -> list[inspect.Type]:
    """The types of a union without null, which is as good as nothing; the type itself if it is
    none. Keeps metadata that say what is expected."""
    match expected:
        case inspect.Metadata(extra=None):
            return _options(expected.type)
        case inspect.UnionType():
            return [option for each in expected.types for option in _options(each)]
        case inspect.NoneType():
            return []
        case _:
            return [expected]


def _names_in(expected: inspect.Type) -> list[str]:
    """The names of the members of an object."""
    options = _options(expected)
    structs = [option for option in options if isinstance(option, inspect.StructType)]
    return [field.encode_name for struct in structs for field in struct.fields]


def _words(expected: inspect.Type) -> str:
    """What a type allows, for people."""
    words = [word for option in _options(expected) for word in _words_of(option)]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _words_of(expected: inspect.Type) -> list[str]:
    """What a type that is no union allows."""
    match expected:
        case inspect.Metadata(extra={"expected": str() as words}):
            return [words]
        case inspect.LiteralType():
            return [f"`{value}`" for value in expected.values]
        case inspect.StrType():
            return [f"a string{_size(expected, 'characters')}"]
        case inspect.IntType():
            return [f"a whole number{_range(expected)}"]
        case inspect.FloatType():
            return [f"a number{_range(expected)}"]
        case inspect.BoolType():
            return ["true or false"]
        case inspect.ListType() | inspect.VarTupleType():
            return [f"a list{_size(expected, 'items')}"]
        case inspect.StructType() | inspect.DictType():
            return ["an object"]
        case _:
            return ["another value"]


def _size(sized: inspect.StrType | inspect.ListType | inspect.VarTupleType, noun: str) -> str:
    """The bounds of a length; empty without any."""
    least, most = sized.min_length, sized.max_length
    if most is None:
        return f" of {least} or more {noun}" if least else ""
    return f" of {least} to {most} {noun}" if least else f" of at most {most} {noun}"


def _range(number: inspect.IntType | inspect.FloatType) -> str:
    """The bounds of a number; empty without any."""
    if number.gt is not None:
        return f" above {number.gt}" + ("" if number.le is None else f", at most {number.le}")
    if number.ge is None:
        return "" if number.le is None else f" of at most {number.le}"
    return f" of {number.ge} or more" if number.le is None else f" from {number.ge} to {number.le}"


def _got(message: str, expected: inspect.Type, is_text: bool) -> str:
    """What is there in place of what is expected, as far as the message says so."""
    if value := _NOT_LISTED.fullmatch(message):
        return f", got `{value[1][:SHOWN_CHARACTERS]}`"
    other = None if is_text else _OTHER_TYPE.fullmatch(message)
    if other is None:
        return ""
    if other[1] == "float" and any(
        isinstance(each, inspect.IntType) for each in _options(expected)
    ):
        return ", got a number with a decimal point"
    return f", got {_TYPE_NAMES.get(other[1], other[1])}"
