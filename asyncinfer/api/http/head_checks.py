"""Checks of a request's head that RFC 9112 requires and the parser does not make."""

import re
from collections.abc import Sequence
from typing import Final

from asyncinfer.api.http.authority import parse_authority
from asyncinfer.api.http.messages import Header
from asyncinfer.errors import MalformedRequest

FRAMING: Final = frozenset({b"transfer-encoding", b"expect"})
"""The fields that `expects_continue` reads."""

_VERSIONS: Final = ("1.1", "1.0")
_ABSOLUTE: Final = re.compile(
    rb"https?://(?P<authority>[^/?]*)(?P<path>/[^?]*)?(?P<query>\?.*)?", re.IGNORECASE
)


def check_version(version: str) -> None:
    """Raises MalformedRequest for versions that the parser takes but that have no such head, as 0.9
    and 2.0."""
    if version not in _VERSIONS:
        raise MalformedRequest(f"This server speaks HTTP/1.1, not HTTP/{version}.")


def expects_continue(headers: Sequence[Header], version: str) -> bool:
    """Whether the client waits for `100 Continue`; `headers` have names in lower case. Raises
    MalformedRequest for a transfer coding that a proxy may read differently: it could take the end
    of the body for another request."""
    expects = False
    for name, value in headers:
        if name == b"expect" and version != "1.0":
            expects |= b"100-continue" in [part.strip(b" \t") for part in value.lower().split(b",")]
        elif name == b"transfer-encoding" and version == "1.0":
            raise MalformedRequest("HTTP/1.0 has no Transfer-Encoding.")
        elif name == b"transfer-encoding" and value.lower() != b"chunked":
            raise MalformedRequest("The only Transfer-Encoding taken is `chunked`.")
    return expects


def is_path(target: bytes) -> bool:
    """Whether the target is a plain path, which needs no `split_target`."""
    return target.startswith(b"/") and b"#" not in target


def split_target(target: bytes, method: bytes) -> tuple[bytes | None, bytes]:
    """The authority in a target, or None, and the path with its query (RFC 9112, 3.2). Raises
    MalformedRequest for any other target."""
    if b"#" in target:
        raise MalformedRequest("A request's target may not have a fragment; leave out `#`.")
    if target == b"*" and method == b"OPTIONS":
        return None, target
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise MalformedRequest("The target must be a path, or `http://HOST/PATH`.")
    return match["authority"], (match["path"] or b"/") + (match["query"] or b"")


def with_host(headers: Sequence[Header], authority: bytes, version: str) -> Sequence[Header]:
    """The headers with a target's authority in place of Host (RFC 9112, 3.2.2). Headers without a
    Host or with several stay as they are, since the application refuses them. Raises InvalidHeader
    if either authority is invalid."""
    parse_authority(authority)
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) == 1:
        parse_authority(hosts[0])
    elif hosts or version != "1.0":
        return headers
    return [(b"host", authority), *(header for header in headers if header[0] != b"host")]
