"""The types of arguments, checked at the public methods by their annotations."""

import functools
import inspect
import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from asyncinfer.client._errors import CannotSend
from asyncinfer.untrusted.printable import printable_name

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])
_SECRETS: Final = frozenset({"api_key"})
"""Arguments that no message shows."""


def with_checked_arguments(kind: type[_T]) -> type[_T]:
    """A class decorator: the constructor and the public methods raise CannotSend for an argument of
    another type than its annotation has. What an input or an iterable holds is not looked at.
    """
    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
            setattr(kind, name, checks_arguments(method))
    return kind


def checks_arguments(method: _F) -> _F:
    """The method with that check before it, which an asynchronous one makes when it is awaited."""

    @functools.cache
    def hints() -> tuple[list[str], dict[str, Any]]:
        return _positional_names(method), _hints_by_name(method)

    def check(values: tuple[Any, ...], named: dict[str, Any]) -> None:
        names, by_name = hints()
        for name, value in (*zip(names, values, strict=False), *named.items()):
            if name in by_name and not _is_of(value, by_name[name]):
                raise CannotSend(_problem(name, value, by_name[name]))

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def checked_async(*values: Any, **named: Any) -> Any:
            check(values, named)
            return await method(*values, **named)

        return cast(_F, checked_async)

    @functools.wraps(method)
    def checked(*values: Any, **named: Any) -> Any:
        check(values, named)
        return method(*values, **named)

    return cast(_F, checked)


def _positional_names(method: Callable[..., Any]) -> list[str]:
    """The names of the parameters that may be given by position, `self` first."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(method).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in by_position]


def _hints_by_name(method: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each parameter, and of each of the options that are passed by keyword."""
    hints: dict[str, Any] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            hints[name] = parameter.annotation
        elif options := get_args(parameter.annotation):
            hints |= get_type_hints(options[0])
    return {name: hint for name, hint in hints.items() if hint is not inspect.Parameter.empty}


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of an annotation; of a Literal only the type counts, as the
    message of a wrong word says more where it is used."""
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return any(_is_of(value, member) for member in get_args(hint))
    if origin is Literal:
        return any(isinstance(value, type(word)) for word in get_args(hint))
    if origin is Sequence:
        return _is_list_of_strings(value)
    if origin is Callable:
        return callable(value)
    if hint is bool:
        return isinstance(value, Integral) or _is_numpy(value)
    if hint in (int, float):
        # NaN is not equal to itself, and no time that one can wait.
        return isinstance(value, Integral if hint is int else Real) and value == value
    return origin in _UNCHECKED or not isinstance(origin, type) or isinstance(value, origin)


def _is_list_of_strings(value: Any) -> bool:
    """Whether it is a list, or another collection, of strings; a single string is none."""
    is_collection = isinstance(value, Collection) or _is_numpy(value) or hasattr(value, "to_list")
    is_other = isinstance(value, str | bytes | Mapping)
    return is_collection and not is_other and all(isinstance(each, str) for each in value)


def _is_numpy(value: Any) -> bool:
    return type(value).__module__ == "numpy"


def _problem(name: str, value: Any, hint: Any) -> str:
    """What the argument is, and what it may be."""
    shown = "" if name in _SECRETS else f"={printable_name(repr(value))}"
    *words, last = dict.fromkeys(_words(hint))
    takes = f"{', '.join(words)} or {last}" if words else last
    return f"{name}{shown} is of the type {type(value).__name__}; {name} takes {takes}."


def _words(hint: Any) -> Iterable[str]:
    """What an annotation stands for, in words."""
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return [word for member in get_args(hint) for word in _words(member)]
    if origin is Literal:
        return [f'"{word}"' for word in get_args(hint)]
    return [_WORDS.get(origin, getattr(origin, "__name__", str(origin)))]


_UNCHECKED: Final = (Any, Iterable)
_WORDS: Final[dict[Any, str]] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    types.NoneType: "None",
    Sequence: "a list of strings",
    Mapping: "a dict",
    Callable: "a function",
    os.PathLike: "a path",
}
