"""Shared docstrings: an asynchronous class has those of the plain class with the same methods."""

import inspect
from collections.abc import Callable
from typing import Final, TypeVar

_T = TypeVar("_T")
_AWAIT: Final = "This method is asynchronous: write `await` before the call."
_ITERATE: Final = "What it returns is iterated with `async for`."


def with_docstrings_of(plain: type) -> Callable[[type[_T]], type[_T]]:
    """A class decorator: gives the public methods the docstrings of those in the class `plain`.

    Each gets a note on `await` or `async for`. In the source the asynchronous methods have only a
    summary, so that each text is written once.
    """

    def complete(asynchronous: type[_T]) -> type[_T]:
        for name, method in vars(asynchronous).items():
            text = getattr(vars(plain).get(name), "__doc__", None)
            if text and not name.startswith("_") and inspect.isfunction(method):
                note = _AWAIT if inspect.iscoroutinefunction(method) else _ITERATE
                method.__doc__ = f"{inspect.cleandoc(text)}\n\n{note}"
        return asynchronous

    return complete
