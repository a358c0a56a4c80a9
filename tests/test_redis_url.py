"""REDIS_URL is taken as it was meant, or refused in a line without any part of a password."""

import inspect
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import (
    URL_QUERY_ARGUMENT_PARSERS,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)

from asyncinfer.errors import InvalidSetting
from asyncinfer.redis_url import RedisUrl, parse

from .certificates import Authority


def refusal(url: str) -> str:
    with pytest.raises(InvalidSetting) as refused:
        parse(url)
    assert "\n" not in refused.value.detail
    assert refused.value.detail.startswith("REDIS_URL")
    return refused.value.detail


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("redis://h", ("h", 6379, 0, None, None)),
        ("REDIS://h:1/2", ("h", 1, 2, None, None)),
        ("redis://h/\n", ("h", 6379, 0, None, None)),
        ("redis://h?db=3", ("h", 6379, 3, None, None)),
        ("redis://:secret@h", ("h", 6379, 0, None, "secret")),
        ("redis://me@h", ("h", 6379, 0, "me", None)),
        ("redis://me:p%40s%2Fs%25@[::1]:7", ("::1", 7, 0, "me", "p@s/s%")),
        ("redis://me:p@ss:w[rd@h", ("h", 6379, 0, "me", "p@ss:w[rd")),
        ("rediss://h?username=me&password=a%26b+c", ("h", 6379, 0, "me", "a&b+c")),
        ("redis://", ("localhost", 6379, 0, None, None)),
    ],
)
def test_a_server_is_taken_as_meant(
    url: str, meant: tuple[str, int, int, str | None, str | None]
) -> None:
    found = parse(url)
    assert (found.host, found.port, found.database, found.username, found.password) == meant


def test_a_socket_is_taken_as_meant() -> None:
    found = parse("unix://me:secret@/run/my%20redis/a b.sock?db=2")
    assert found.socket_path == "/run/my redis/a b.sock"
    assert (found.username, found.password, found.database) == ("me", "secret", 2)


def test_sentinels_with_passwords_and_tls_are_taken_as_meant() -> None:
    found = parse(
        "sentinel://me:p%40ss@a:1,b,[::1]:3/main/4?ssl=true&sentinel_ssl=yes"
        "&sentinel_username=watcher&sentinel_password=other%20one&ssl_cert_reqs=CERT_NONE"
    )
    assert found.sentinels == (("a", 1), ("b", 26379), ("::1", 3))
    assert (found.service, found.database) == ("main", 4)
    assert (found.username, found.password) == ("me", "p@ss")
    assert (found.sentinel_username, found.sentinel_password) == ("watcher", "other one")
    assert (found.has_tls, found.sentinel_tls) == (True, True)
    assert found.tls == {"ssl_cert_reqs": "none"}


# --- passwords -------------------------------------------------------------------------------

_HIDDEN = st.text("abXY01@/#?%:&=[]+,. \\'\"é", min_size=1, max_size=12)


@given(_HIDDEN, st.sampled_from(["redis", "rediss", "sentinel"]))
def test_a_password_that_was_not_encoded_is_taken_whole_or_refused_without_any_part_of_it(
    password: str, scheme: str
) -> None:
    url = f"{scheme}://user:{password}@server:26379/{'s/' * (scheme == 'sentinel')}3"
    found, refused = parsed_or_refused(url)
    if found is None:
        assert set(refused.split()) <= _WORDS_OF_REFUSALS
        return
    assert (found.password or "") == unquote(password)
    assert (found.host or found.sentinels[0][0]) == "server"
    assert found.shown.startswith(f"{scheme}://server:26379")


def parsed_or_refused(url: str) -> tuple[RedisUrl | None, str]:
    try:
        return parse(url), ""
    except InvalidSetting as error:
        return None, error.detail


_WORDS_OF_REFUSALS = {
    word
    for url in (
        *("redis://h:x", "redis://h/x", "redis://a,b", "redis://h?A=1", "redis://a b"),
        *("redis://%zz@h", "redis://%ff@h", "sentinel://h:1", "redis://u:p/w@h"),
    )
    for word in refusal(url).split()
}
"""Of refusals of URLs in which no part is longer than a letter or two."""


@given(_HIDDEN)
def test_an_encoded_password_is_taken_whole(password: str) -> None:
    encoded = quote(password, safe="")
    assert parse(f"redis://user:{encoded}@h/1").password == password
    assert parse(f"redis://h?username=u&password={encoded}").password == password


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p@ss/w#rd@h:6379/0",
        "redis://u:p/w@h",
        "redis://u:p?w@h",
        "redis://u:p#w@h",
        "redis://u:100%zz@h",
        "sentinel://u:p/w@h:26379/main",
        "unix://u:p/w@/run/s",
    ],
)
def test_a_refused_password_comes_with_how_to_encode_it(url: str) -> None:
    assert "percent-encode" in refusal(url)


def test_nothing_secret_is_in_what_a_debugger_or_a_traceback_shows() -> None:
    found = parse("sentinel://me:secret1@h:1/main?sentinel_password=secret2")
    assert repr(found) == str(found) == "RedisUrl(sentinel://h:1/main)"


# --- what it is not ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h:6379/mydb", "a database that is no number"),
        ("redis://h/1/2", "a database that is no number"),
        ("redis://h/1?db=2", "a database in its path and as the option db"),
        ("redis://u:p@h?password=x", "a password before the @ and as an option"),
        ("redis://h:0", "a port that is no number from 1 to 65535"),
        ("redis://a:1,b:2", "several hosts, which only sentinel://"),
        ("redis://h?db=1&db=2", "the option db twice"),
        ("rediss://h?ssl_ca_certs=", "the option ssl_ca_certs without a value"),
        ("rediss://h?ssl_check_hostname=perhaps", "must be true or false"),
        ("rediss://h?ssl_cert_reqs=never", "must be required or none"),
        ("rediss://h?ssl_keyfile=/k", "ssl_keyfile without ssl_certfile"),
        ("redis://h?ssl_cert_reqs=none", "For TLS write rediss://"),
        ("redis://h?ssl=true", "For TLS write rediss://"),
        ("sentinel://h/s?ssl_cert_reqs=none", "Add ssl=true"),
        ("unix://run/redis.sock?db=1", "the absolute path of a socket"),
        ("unix:///", "the absolute path of a socket"),
        ("http://me:secret@h", "must have one of the forms redis://host"),
        ("me:secret@h:6379", "must have one of the forms redis://host"),
    ],
)
def test_what_would_be_taken_otherwise_than_meant_is_refused(url: str, words: str) -> None:
    message = refusal(url)
    assert words in message
    assert "secret" not in message


def test_an_unknown_option_is_named_with_those_that_there_are() -> None:
    message = refusal("rediss://h?ssl_ca_cert=/ca.pem")
    assert "the option ssl_ca_cert, which" in message
    assert "Did you mean ssl_ca_certs?" in message
    assert "ssl_check_hostname" in message
    assert "Did you mean" not in refusal("redis://h?foo=bar")


def redis_py_options() -> list[str]:
    found = set(URL_QUERY_ARGUMENT_PARSERS)
    for kind in (SSLConnection, Connection, UnixDomainSocketConnection):
        for base in kind.__mro__[:-1]:
            found |= set(inspect.signature(base).parameters)
    return sorted(found - {"args", "kwargs", "host", "port", "path"})


def test_every_option_of_redis_py_is_taken_or_refused_by_its_name() -> None:
    outcomes = {
        option: parsed_or_refused(f"rediss://h?{option}=1")[1] for option in redis_py_options()
    }
    taken = ("db", "password", "socket_keepalive", "ssl_check_hostname", "ssl_password", "username")
    assert {option for option, refused in outcomes.items() if not refused} <= set(taken)
    assert all(option in refused for option, refused in outcomes.items() if refused)


# --- certificates and keys --------------------------------------------------------------------


def test_the_files_of_tls_are_taken_or_refused_by_their_paths(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("client")
    other_key = authority.issue("other")[1]
    not_pem = tmp_path / "notes.txt"
    not_pem.write_text("no certificate")

    def url(**options: Path) -> str:
        return "rediss://h?" + "&".join(f"{name}={path}" for name, path in options.items())

    assert isinstance(
        parse(url(ssl_ca_certs=authority.certificate, ssl_certfile=certificate, ssl_keyfile=key)),
        RedisUrl,
    )
    absent = refusal(url(ssl_ca_certs=tmp_path / "absent.pem"))
    assert f"{tmp_path}/absent.pem cannot be read (No such file or directory)" in absent
    assert f"{not_pem} cannot be used as ssl_ca_certs" in refusal(url(ssl_ca_certs=not_pem))
    mismatch = refusal(url(ssl_certfile=certificate, ssl_keyfile=other_key))
    assert "key values mismatch" in mismatch
