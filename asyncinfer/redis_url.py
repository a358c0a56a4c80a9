"""REDIS_URL, parsed and checked; no message shows a user or a part of a password."""

import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Final, NoReturn
from urllib.parse import unquote

from msgspec import Struct

from asyncinfer.errors import InvalidSetting

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_MAX_DATABASE: Final = 1 << 31

_FORMS: Final = (
    "redis://host:6379/0, rediss:// for TLS, unix:///path/to/socket or "
    "sentinel://host:26379,host2:26379/service"
)
_ENCODE: Final = (
    "In a user or password percent-encode what is no letter or digit: @ as %40, / as %2F, # as "
    "%23, ? as %3F, % as %25."
)

_OWN_OPTIONS: Final = frozenset(
    {
        *("client_name", "connection_class", "connection_pool", "credential_provider"),
        *("decode_responses", "driver_info", "encoding", "encoding_errors", "event_dispatcher"),
        *("health_check_interval", "legacy_responses", "lib_name", "lib_version"),
        *("max_connections", "parser_class", "protocol", "retry", "retry_on_error"),
        *("retry_on_timeout", "single_connection_client", "socket_connect_timeout"),
        *("socket_read_size", "socket_timeout", "timeout"),
    }
)
"""Options of redis-py that would change how this package talks with the server."""


class RedisUrl(Struct, frozen=True, kw_only=True):
    """Where the server is, and how to connect to it."""

    shown: str
    """The URL without user, password and options."""
    host: str = ""
    port: int = _PORT
    socket_path: str = ""
    """The path of a Unix socket; then there is no host."""
    sentinels: tuple[tuple[str, int], ...] = ()
    """Hosts and ports of sentinels; then they name the server, and there is no host."""
    service: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = None
    has_tls: bool = False
    """Whether connections to the server use TLS; `sentinel_tls`: those to sentinels."""
    tls: dict[str, Any] = {}
    """redis-py's `ssl_` options for connections with TLS."""
    sentinel_tls: bool = False
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    keepalive: bool | None = None

    def __repr__(self) -> str:
        return f"RedisUrl({self.shown})"


def parse(url: str) -> RedisUrl:
    """Parses REDIS_URL, and reads the certificates and keys that it names.

    Raises InvalidSetting for all that would be taken otherwise than it was meant.
    """
    scheme, rest = _scheme(url.strip())
    # DATA_DIR, and so the socket in it, may have a space in its path.
    if re.search(r"[\x00-\x1f\x7f]" if scheme == "unix" else r"[\x00-\x20\x7f]", rest):
        _refuse(f"has a space or a control character inside. {_ENCODE}")
    authority, path, query = _split(rest)
    if "#" in rest or "@" in query or (authority and "@" in path):
        _refuse(f"has @ or # behind the host. {_ENCODE}")
    if re.search(r"%(?![0-9A-Fa-f]{2})", rest):
        _refuse(f"has a % that begins no percent-encoded character. {_ENCODE}")
    userinfo, _, hosts = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    options = _options(scheme, query)
    place = _PLACES[scheme](hosts, path)
    credentials = {"username": _decoded(user) or None, "password": _decoded(password) or None}
    shown = f"{scheme}://{hosts}{path}"
    return _with_options(scheme, {"shown": shown, **place}, credentials, options)


def _refuse(what: str) -> NoReturn:
    raise InvalidSetting(f"REDIS_URL {what}")


def _scheme(url: str) -> tuple[str, str]:
    """The scheme in lower case, and what follows `://`."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in _PLACES:
        _refuse(f"must have one of the forms {_FORMS}.")
    return scheme.lower(), rest


def _split(rest: str) -> tuple[str, str, str]:
    """Authority, path and query. Not by urlsplit, which drops line breaks and, as of Python 3.13,
    refuses a list of hosts in which an IPv6 address is not the first."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path, _, query = rest[len(authority) :].partition("?")
    return authority, path, query


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        # Not chained: the error shows the bytes.
        raise InvalidSetting(
            f"REDIS_URL has percent-encoded bytes that are not UTF-8. {_ENCODE}"
        ) from None


# --- the place of the server -----------------------------------------------------------------


def _tcp(hosts: str, path: str) -> dict[str, Any]:
    if "," in hosts:
        _refuse("names several hosts, which only sentinel://host:26379,host2:26379/service may.")
    host, port = _address(hosts, _PORT)
    return {"host": host or "localhost", "port": port, "database": _database(path)}


def _unix(hosts: str, path: str) -> dict[str, Any]:
    if hosts or not path.strip("/"):
        _refuse(
            "with unix:// must have the absolute path of a socket: unix:///run/redis.sock. "
            f"{_ENCODE}"
        )
    return {"socket_path": _decoded(path)}


def _sentinel(hosts: str, path: str) -> dict[str, Any]:
    service, _, database = path.removeprefix("/").partition("/")
    sentinels = tuple(_address(host, _SENTINEL_PORT) for host in hosts.split(","))
    if not service or not all(host for host, _ in sentinels):
        _refuse(
            "with sentinel:// must name sentinels and a service: "
            "sentinel://host:26379,host2:26379/service."
        )
    return {
        "sentinels": sentinels,
        "service": _decoded(service),
        "database": _database(database),
    }


_PLACES: Final[dict[str, Callable[[str, str], dict[str, Any]]]] = {
    "redis": _tcp,
    "rediss": _tcp,
    "unix": _unix,
    "sentinel": _sentinel,
}
"""By scheme, what reads hosts and path."""


def _address(text: str, default_port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%25\w+)?\]|[^\[\]:]*)(?::([0-9]{1,5}))?", text)
    port = int(found[2] or default_port) if found else 0
    if not found or not 1 <= port <= 65535:
        # What stands in the place of a port may be a part of a password.
        _refuse(
            "has a port that is no number from 1 to 65535 (write host:6379, and an IPv6 address "
            f"as [::1]:6379). {_ENCODE}"
        )
    return _decoded(found[1]).strip("[]"), port


def _database(text: str) -> int:
    number = text.strip("/")
    if not re.fullmatch(r"[0-9]{0,10}", number) or int(number or 0) >= _MAX_DATABASE:
        _refuse(
            "has a database that is no number, as in redis://host:6379/0. To keep deployments on "
            f"one server apart, set QUEUE_NAME. {_ENCODE}"
        )
    return int(number or 0)


# --- its options -----------------------------------------------------------------------------


def _flag(value: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
        value.lower()
    ]


def _verification(value: str) -> str:
    """Also as Celery writes it. `optional` is for servers: clients verify with it as well."""
    names = {"required": "required", "optional": "required", "none": "none"}
    return names[value.lower().removeprefix("cert_")]


_FLAG: Final = "true or false"
_VALUES: Final[dict[str, tuple[Callable[[str], Any], str]]] = {
    "db": (_database, "a number"),
    "socket_keepalive": (_flag, _FLAG),
    "ssl": (_flag, _FLAG),
    "sentinel_ssl": (_flag, _FLAG),
    "ssl_cert_reqs": (_verification, "required or none"),
    "ssl_check_hostname": (_flag, _FLAG),
}
"""By option, what reads its value, and the values that it allows; those of others are text."""

_LOGIN: Final = ("username", "password")
_TLS: Final = (
    *("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"),
    *("ssl_cert_reqs", "ssl_check_hostname"),
)
_OF_SENTINEL: Final = ("ssl", "sentinel_ssl", "sentinel_username", "sentinel_password")
_OPTIONS: Final = {
    "redis": ("db", *_LOGIN, "socket_keepalive"),
    "rediss": ("db", *_LOGIN, "socket_keepalive", *_TLS),
    "unix": ("db", *_LOGIN),
    "sentinel": ("db", *_LOGIN, "socket_keepalive", *_OF_SENTINEL, *_TLS),
}


def _options(scheme: str, query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        _check_name(scheme, name)
        if name in options:
            _refuse(f"has the option {name} twice. Leave one out.")
        if not value:
            _refuse(f"has the option {name} without a value. Leave it out, or give it one.")
        read, allowed = _VALUES.get(name, (str, "text"))
        try:
            options[name] = read(_decoded(value))
        except KeyError:
            # Not chained: the error shows the value.
            raise InvalidSetting(f"REDIS_URL: the option {name} must be {allowed}.") from None
    return options


def _check_name(scheme: str, name: str) -> None:
    allowed = _OPTIONS[scheme]
    if name in allowed:
        return
    if not re.fullmatch(r"[a-z_]{1,40}", name):
        _refuse(f"has an option with a name that cannot be one. {_ENCODE}")
    if name in _OWN_OPTIONS:
        _refuse(f"has the option {name}, which asyncinfer sets itself. Leave it out.")
    if scheme == "redis" and (name == "ssl" or name in _TLS):
        _refuse(f"has the option {name}, which redis:// does not have. For TLS write rediss://.")
    close = get_close_matches(name, allowed, 1, 0.6)
    meant = f" Did you mean {close[0]}?" if close else ""
    _refuse(
        f"has the option {name}, which asyncinfer does not know.{meant} With {scheme}:// it takes "
        f"{', '.join(allowed)}."
    )


def _with_options(
    scheme: str, place: dict[str, Any], credentials: dict[str, Any], options: dict[str, Any]
) -> RedisUrl:
    for name in _LOGIN:
        if credentials[name] and name in options:
            _refuse(f"has a {name} before the @ and as an option. Leave one out.")
    if place.get("database") and "db" in options:
        _refuse("has a database in its path and as the option db. Leave one out.")
    has_tls = scheme == "rediss" or options.get("ssl", False)
    sentinel_tls = options.get("sentinel_ssl", False)
    tls: dict[str, Any] = {name: options[name] for name in _TLS if name in options}
    if tls and not (has_tls or sentinel_tls):
        _refuse(
            f"has the option {next(iter(tls))} but no TLS. Add ssl=true (or sentinel_ssl=true)."
        )
    if has_tls or sentinel_tls:
        _check_files(tls)
    return RedisUrl(
        **{**place, "database": options.get("db", place.get("database", 0))},
        username=credentials["username"] or options.get("username"),
        password=credentials["password"] or options.get("password"),
        has_tls=has_tls,
        tls=tls,
        sentinel_tls=sentinel_tls,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
        keepalive=options.get("socket_keepalive"),
    )


def _check_files(tls: dict[str, Any]) -> None:
    """Raises InvalidSetting if a certificate or key cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for option, file, folder in (
        ("ssl_ca_certs", tls.get("ssl_ca_certs"), None),
        ("ssl_ca_path", None, tls.get("ssl_ca_path")),
    ):
        if path := file or folder:
            with _usable(option, path):
                context.load_verify_locations(file, folder)
    certificate, key = tls.get("ssl_certfile"), tls.get("ssl_keyfile")
    if key and not certificate:
        _refuse("has the option ssl_keyfile without ssl_certfile.")
    if certificate:
        # Without a password OpenSSL would ask the terminal for one.
        password = tls.get("ssl_password", "")
        with _usable("ssl_certfile", certificate, *([key] if key else [])):
            context.load_cert_chain(certificate, key, lambda: password)


@contextmanager
def _usable(option: str, *paths: str) -> Iterator[None]:
    """Raises InvalidSetting if one of the files, or the folder, cannot be read or used."""
    try:
        for path in paths:
            os.stat(path)
        yield
    except ssl.SSLError as error:
        why = error.reason.lower().replace("_", " ") if error.reason else "no PEM file"
        raise InvalidSetting(
            f"REDIS_URL: {' with '.join(paths)} cannot be used as {option} ({why})."
        ) from error
    except OSError as error:
        raise InvalidSetting(
            f"REDIS_URL: {error.filename or paths[0]} cannot be read ({error.strerror}). Correct "
            f"the option {option}."
        ) from error
