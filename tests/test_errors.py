"""The tree of errors at the top of their module."""

import inspect
import re

from asyncinfer import errors


def test_the_tree_of_errors_has_each_of_them() -> None:
    in_tree = set(re.findall(r"\w+", inspect.getdoc(errors) or ""))
    classes = {
        name
        for name, found in vars(errors).items()
        if inspect.isclass(found) and issubclass(found, errors.AsyncinferError)
    }
    assert classes - in_tree == set()
