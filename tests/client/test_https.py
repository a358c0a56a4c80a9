"""HTTPS: a proxy with a certificate of an own CA, and what is said where it is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncinfer.client import AsyncClient, Client, ConnectionFailed, WrongAddress
from asyncinfer.testing import Running
from tests.certificates import Authority
from tests.cli.command_line import error_line, run_command
from tests.ports import free_port
from tests.tls_proxy import tls_in_front_of

ROW = [[5.1, 3.5, 1.4, 0.2]]
NOT_ANSWERED = 3


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def https(authority: Authority, running: Running) -> Iterator[str]:
    """The service behind a proxy with a certificate for 127.0.0.1 and localhost."""
    context = authority.server_context("127.0.0.1", "localhost")
    with tls_in_front_of(running.url, context) as port:
        yield f"https://127.0.0.1:{port}"


async def test_a_client_that_trusts_the_ca_works_by_https(
    https: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(https, ca=authority.certificate) as client:
        job = client.submit(ROW, "iris")
        assert [event.data["status"] for event in job.events()][-1] == "completed"
        assert job.result() == client.predict(ROW, "iris")
    monkeypatch.setenv("ASYNCINFER_CA", str(authority.certificate))
    async with AsyncClient(https.replace("127.0.0.1", "localhost")) as aclient:
        assert (await aclient.predict(ROW, "iris"))["class_name"] == "setosa"


def test_what_the_system_trusts_is_trusted_at_a_local_address_too(
    https: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    with Client(https) as client:
        assert client.predict(ROW, "iris")["class_name"] == "setosa"


@pytest.mark.parametrize(
    ("name", "is_expired", "is_trusted", "words"),
    [
        ("127.0.0.1", True, True, "its certificate has expired. Renew it"),
        (
            *("127.0.0.1", False, False),
            "its certificate is not trusted (unable to get local issuer certificate). Give the CA "
            "that signed it: ca=, or ASYNCINFER_CA.",
        ),
        (
            *("api.example.com", False, True),
            "its certificate is for another host name (IP address mismatch, certificate is not "
            "valid for '127.0.0.1'). Give an address",
        ),
    ],
)
async def test_a_certificate_that_is_refused_is_named_at_once(
    name: str,
    is_expired: bool,
    is_trusted: bool,
    words: str,
    authority: Authority,
    running: Running,
) -> None:
    ca = authority.certificate if is_trusted else None
    context = authority.server_context(name, is_expired=is_expired)
    with tls_in_front_of(running.url, context) as port:
        url = f"https://127.0.0.1:{port}"
        with Client(url, ca=ca) as client, pytest.raises(ConnectionFailed) as failed:
            client.predict(ROW, "iris")
        assert failed.value.detail.startswith(f"No answer from {url}: {words}")
        async with AsyncClient(url, ca=ca) as aclient:
            with pytest.raises(ConnectionFailed) as same:
                await aclient.predict(ROW, "iris")
        assert same.value.detail == failed.value.detail


def test_https_to_a_port_without_tls_is_told_so(running: Running) -> None:
    with (
        Client(running.url.replace("http://", "https://me:secret@")) as client,
        pytest.raises(ConnectionFailed) as failed,
    ):
        client.health()
    assert "this port speaks no TLS. Give its address with http://" in failed.value.detail
    assert "secret" not in failed.value.detail
    assert "secret" not in repr(client)


def test_http_to_a_port_with_tls_is_asked_whether_it_has_tls(https: str) -> None:
    with (
        Client(https.replace("https://", "http://"), retries=0) as client,
        pytest.raises(ConnectionFailed) as failed,
    ):
        client.health()
    assert "begin with http:// or with https://" in failed.value.detail
    assert "nothing listens" not in failed.value.detail


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:{port}", "nothing listens there"),
        ("http://localhost:{port}", "nothing listens there"),
        ("http://no.such.host.invalid", "the host name is not known"),
    ],
)
async def test_what_the_system_says_of_an_address_is_passed_on(address: str, words: str) -> None:
    url = address.format(port=free_port())
    with Client(url) as client, pytest.raises(ConnectionFailed, match=f": {words}. Is it running"):
        client.health()
    async with AsyncClient(url) as aclient:
        with pytest.raises(ConnectionFailed, match=f": {words}. Is it running"):
            await aclient.health()


def test_a_ca_file_that_cannot_be_used_is_refused_when_the_client_is_made(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no certificate")
    with pytest.raises(WrongAddress, match=r"absent.pem' cannot be used: No such file"):
        Client("https://h", ca=tmp_path / "absent.pem")
    with pytest.raises(WrongAddress, match=r"it has no certificate. Give a PEM file: ca=, or"):
        AsyncClient("https://h", ca=str(notes))
    with pytest.raises(WrongAddress, match=r"The URL is 'h'; give one such as"):
        Client("ftp://me:secret@h")


# --- the command line -------------------------------------------------------------------------


def test_commands_take_the_ca_and_name_the_reason_without_it(
    https: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What doctor says of local models, which takes it a second, is no matter here.
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    ca = str(authority.certificate)
    predicted = run_command("predict", "5.1", "3.5", "1.4", "0.2", "--url", https, "--ca", ca)
    assert predicted.code == 0, predicted
    assert "setosa" in predicted.out
    line = error_line(run_command("models", "--url", https), NOT_ANSWERED)
    assert "its certificate is not trusted" in line
    assert "Give the CA that signed it: --ca, or ASYNCINFER_CA." in line
    doctor = run_command("doctor", "--url", https)
    assert f"problem  API: No answer from {https}: its certificate is not trusted" in doctor.out
    assert "-> Give the CA that signed it: --ca, or ASYNCINFER_CA" in doctor.out
    assert f"API: answers at {https}" in run_command("doctor", "--url", https, "--ca", ca).out


@pytest.mark.soak
def test_the_bench_runs_by_https(https: str, authority: Authority) -> None:
    ran = run_command("bench", "--url", https, "--ca", str(authority.certificate), "--seconds", "1")
    assert ran.code == 0, ran
