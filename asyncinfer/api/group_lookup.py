"""The group that a request names, and the error if there is none."""

import re
from typing import Any

from asyncinfer.api.http.messages import Request
from asyncinfer.errors import GroupNotFound
from asyncinfer.jobs import GROUP_PATTERN

_name = re.compile(GROUP_PATTERN)


def group_of(request: Request[Any]) -> str:
    """The group in the path; raises GroupNotFound if no group can have such a name."""
    group = request.path("group") or ""
    if not _name.fullmatch(group):
        raise group_not_found_error()
    return group


def group_not_found_error() -> GroupNotFound:
    """Makes the error for a group that does not exist."""
    return GroupNotFound(
        "There is no group of this name; a group is created when a job is submitted with "
        "`options.group`, and kept for 7 days after its last submit."
    )
