"""Which URLs a webhook may have, and which addresses its host may have."""

import re
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from asyncinfer.errors import InvalidSetting, WebhookRefused
from asyncinfer.webhooks import addresses
from asyncinfer.webhooks.addresses import Address

MAX_URL_CHARACTERS: Final = 2048
_MAX_HOST_CHARACTERS: Final = 253

_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?:\[(?P<ipv6>[^\[\]/?#@]*)\]|(?P<host>[^\[\]/?#@:]*))(?::(?P<port>[^/?#@:]*))?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?",
    re.IGNORECASE,
)
_VISIBLE_ASCII = re.compile(r"[!-~]+")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_PORTS: Final = {"http": 80, "https": 443}


class Target(Struct, frozen=True):
    """A URL that was checked. The host is a name in lower case, or an IP address without brackets;
    `path` has the query too."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = _in_url(self.host)
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class UrlRules:
    """Checks URLs by their form, and addresses when a name was resolved. No check does any I/O."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        """`allowed` has `host:port` of receivers that may have http and any address, as in
        WEBHOOK_ALLOW; raises InvalidSetting for another form."""
        self._allowed = frozenset(_allowed_receiver(text) for text in allowed)

    def check(self, url: str) -> Target:
        """The parts of a URL that a webhook may have. Raises WebhookRefused, which says why not. A
        host name may still have addresses that are refused (`check_address`)."""
        target = _parsed(url)
        is_allowed = (target.host, target.port) in self._allowed
        if target.scheme != "https" and not is_allowed:
            raise _refused("use https, so that nobody on the way reads or changes it")
        address = addresses.parse(target.host)
        if address is not None:
            self.check_address(target.host, target.port, address)
        elif "." not in target.host and not is_allowed:
            raise _refused(f"{target.host!r} is no public host name")
        return target

    def check_address(self, host: str, port: int, address: Address) -> None:
        """Raises WebhookRefused if a webhook to `host:port` may not be sent to this address of
        it. The message does not say the address: it would tell a tenant what names inside mean."""
        if addresses.is_metadata(address):
            raise _refused(f"{host} has an address of a cloud's metadata service")
        if (host, port) not in self._allowed and not addresses.is_public(address):
            raise _refused(
                f"{host} has an address that is not public; the operator may add "
                f"{_in_url(host)}:{port} to WEBHOOK_ALLOW"
            )


def _in_url(host: str) -> str:
    """A host as a URL has it: an IPv6 address is in brackets."""
    return f"[{host}]" if ":" in host else host


def normal_host(text: str) -> str:
    """A host without port as targets have it: a name in lower case, or an address in its usual form
    without brackets. Raises WebhookRefused if no URL can have it."""
    text = text.lower()
    if text.startswith("[") and text.endswith("]"):
        return _host(text[1:-1], "")
    return _host(text, "") if ":" in text else _host(None, text)


def _parsed(url: str) -> Target:
    """The parts of a URL; raises WebhookRefused unless its form is one that every program reads in
    the same way."""
    if len(url) > MAX_URL_CHARACTERS:
        raise _refused(f"it has more than {MAX_URL_CHARACTERS} characters")
    if not _VISIBLE_ASCII.fullmatch(url) or "\\" in url:
        raise _refused(
            "it has a space, a backslash or a character that is not ASCII; write the host in its "
            "xn-- form, and the rest percent-encoded"
        )
    if "#" in url:
        raise _refused("it has a fragment (`#`), which is never sent")
    if "@" in url.partition("://")[2].partition("/")[0].partition("?")[0]:
        raise _refused("it has a user name or password; use a token in its path or query")
    found = _URL.fullmatch(url)
    if not found:
        raise _refused("it must be https://host/path")
    scheme = found["scheme"].lower()
    host = _host(found["ipv6"], (found["host"] or "").lower())
    path = (found["path"] or "/") + (found["query"] or "")
    return Target(scheme, host, _port(found["port"], scheme), path)


def _host(ipv6: str | None, name: str) -> str:
    """The host of a URL; raises WebhookRefused. An address in another form than the usual one
    (127.1, 0x7f000001, 2130706433) is refused: programs differ in what it means."""
    if ipv6 is not None:
        address = addresses.parse(ipv6)
        if address is None or address.version == 4:
            raise _refused("what is in brackets must be an IPv6 address without a zone")
        return str(address)
    if addresses.parse(name):
        return name
    if name.endswith("."):
        raise _refused("write its host without the dot at the end")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        raise _refused("an IPv4 address is written as four decimal numbers without leading zeros")
    if len(name) > _MAX_HOST_CHARACTERS or not all(map(_LABEL.fullmatch, labels)):
        raise _refused("its host is not a host name")
    return name


def _port(text: str | None, scheme: str) -> int:
    if text is None:
        return _PORTS[scheme]
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise _refused("its port is not a number from 1 to 65535")
    return int(text)


def _refused(reason: str) -> WebhookRefused:
    return WebhookRefused(f"The webhook's URL is refused: {reason}.")


def _allowed_receiver(text: str) -> tuple[str, int]:
    """Host and port of an entry of WEBHOOK_ALLOW; raises InvalidSetting. A host name here needs no
    dot: it may be one of the operator's own network."""
    try:
        target = _parsed(f"https://{text}")
    except WebhookRefused as error:
        raise InvalidSetting(f"WEBHOOK_ALLOW has {text[:100]!r}: {error.detail}") from error
    has_port = re.search(r":[0-9]+$", text)
    if not has_port or target.path != "/" or text.endswith("/"):
        raise InvalidSetting(f"WEBHOOK_ALLOW has {text[:100]!r}; each entry must be host:port.")
    return target.host, target.port
