"""What RFC 9112 asks of a request's head beyond what the parser checks."""

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
    """The parser takes 0.9 and 2.0 too, which have no such head."""
    if version not in _VERSIONS:
        raise MalformedRequest(f"This server speaks HTTP/1.1, not HTTP/{version}.")


def expects_continue(headers: Sequence[Header], version: str) -> bool:
    """Whether the client waits for `100 Continue`; raises MalformedRequest for a body whose end a
    proxy may see elsewhere, and take what follows for another request."""
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
    """Whether the target is the usual one, which `split_target` need not see."""
    return target.startswith(b"/") and b"#" not in target


def split_target(target: bytes, method: bytes) -> tuple[bytes | None, bytes]:
    """The authority in a target, where it has one, and the path with its query (RFC 9112, 3.2)."""
    if b"#" in target:
        raise MalformedRequest("A request's target has no fragment; leave out `#`.")
    if target == b"*" and method == b"OPTIONS":
        return None, target
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        raise MalformedRequest("The target is a path, or `http://HOST/PATH`.")
    return found["authority"], (found["path"] or b"/") + (found["query"] or b"")


def named_host(headers: Sequence[Header], authority: bytes, version: str) -> Sequence[Header]:
    """The headers with a target's authority in the place of Host (RFC 9112, 3.2.2), once that is a
    valid one: the application refuses several, and none."""
    parse_authority(authority)
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) == 1:
        parse_authority(hosts[0])
    elif hosts or version != "1.0":
        return headers
    return [(b"host", authority), *(header for header in headers if header[0] != b"host")]
