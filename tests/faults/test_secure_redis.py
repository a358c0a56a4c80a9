"""A whole service whose Redis wants TLS, client certificates and a user with few rights."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from asyncinfer.client import Client, JobCancelled
from tests.certificates import Authority
from tests.ports import free_port
from tests.process import REPOSITORY
from tests.redis_server import running_server
from tests.tls_proxy import tls_in_front_of

from .harness import eventually_sync
from .services import Services, open_services

pytestmark = [pytest.mark.soak, pytest.mark.system("redis-server")]

_PAGE: Final = (files("asyncinfer") / "docs" / "security.md").read_text()
_LINE: Final = re.search(r"^ACL SETUSER asyncinfer on >PASSWORD (.*)$", _PAGE, re.MULTILINE)
assert _LINE
RIGHTS: Final = _LINE[1]
PASSWORD: Final = "p@ss/w#rd%1"
ENCODED: Final = "p%40ss%2Fw%23rd%251"
PARTS: Final = ("p@ss", "w#rd", "p%40ss")
ROW: Final = [[5.1, 3.5, 1.4, 0.2]]


class SecureRedis:
    """Servers with TLS that want a client certificate; `options` are those of REDIS_URL for it."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        certificate, key = self.authority.issue("127.0.0.1", "localhost")
        self.own_certificate, self.own_key = self.authority.issue("asyncinfer")
        self.folder = folder
        self.flags = (
            *("--dir", str(folder), "--port", "0", "--tls-port", "{port}"),
            *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
            *("--tls-ca-cert-file", str(self.authority.certificate), "--tls-replication", "yes"),
        )
        self.options = (
            f"ssl_ca_certs={self.authority.certificate}&ssl_certfile={self.own_certificate}"
            f"&ssl_keyfile={self.own_key}"
        )

    def client(self, port: int, **login: str) -> Any:
        return redis.Redis(
            port=port,
            ssl=True,
            ssl_ca_certs=str(self.authority.certificate),
            ssl_certfile=str(self.own_certificate),
            ssl_keyfile=str(self.own_key),
            **login,  # type: ignore[arg-type]
        )

    @contextmanager
    def server(self) -> Iterator[int]:
        """A server that lets in the user of the security page alone; its port."""
        with running_server("redis-server", *self.flags) as port:
            admin = self.client(port)
            admin.execute_command(f"ACL SETUSER asyncinfer on >{PASSWORD} {RIGHTS}")
            admin.execute_command("ACL SETUSER admin on >secret ~* &* +@all")
            admin.execute_command("ACL SETUSER default off")
            admin.close()
            yield port

    @contextmanager
    def sentinel(self, server_port: int) -> Iterator[int]:
        """A sentinel that watches the server, and wants a password; its port."""
        conf = self.folder / "sentinel.conf"
        conf.write_text(
            f"sentinel monitor main 127.0.0.1 {server_port} 1\n"
            "sentinel auth-user main admin\nsentinel auth-pass main secret\n"
            "user default off\nuser admin on >secret ~* &* +@all\n"
            "user watcher on >watchword +sentinel|masters +sentinel|get-master-addr-by-name\n"
        )
        with running_server("redis-server", str(conf), "--sentinel", *self.flags) as port:
            client = self.client(port, username="admin", password="secret")

            def knows() -> bool:
                return bool(client.sentinel_masters()["main"]["is_master"])

            eventually_sync(knows, "the sentinel knows the server")
            client.close()
            yield port


def live_through_everything(client: Client, services: Services) -> None:
    """The life of jobs of all kinds."""
    assert client.predict(ROW, "iris")["class_name"] == "setosa"
    job = client.submit(ROW, "iris", group="g", priority="high")
    assert [event.data["status"] for event in job.events()][-1] == "completed"
    assert len(list(client.map(ROW * 500, "iris", group="m"))) == 500
    delayed = client.submit(ROW, "iris", delay_seconds=600, group="g")
    delayed.cancel()
    with pytest.raises(JobCancelled):
        delayed.result()
    client.pause("iris")
    delayed.retry()
    assert client.job(delayed.id).status == "pending"
    client.resume("iris")
    waiting = client.submit(ROW, "iris", delay_seconds=600)
    assert waiting.status == "pending"
    assert client.cancel_all(model="iris", status="pending").cancelled
    assert client.group("g").jobs == 2
    assert len(list(client.jobs())) >= 5
    assert {queue.model for queue in client.queues()} >= {"iris"}
    assert len(client.workers()) == 1
    assert (client.health().redis or "").startswith("Redis 7.")
    assert client.purge(group="m").purged
    # Sweeps, repairs and the libraries of older releases have their turn.
    swept = client.submit(ROW, "iris", finish_within_seconds=600)
    eventually_sync(lambda: client.job(swept.id).status == "completed", "it is completed")
    for word in ("NOPERM", "permission", "refuse", *PARTS):
        assert word not in services.log


@pytest.fixture
def secure(tmp_path: Path) -> SecureRedis:
    return SecureRedis(tmp_path)


def test_all_that_jobs_live_through_runs_by_tls_with_the_rights_of_the_security_page(
    secure: SecureRedis, tmp_path: Path
) -> None:
    with secure.server() as port:
        url = f"rediss://asyncinfer:{ENCODED}@127.0.0.1:{port}?{secure.options}"
        serve_and_use(url, secure, tmp_path)


@pytest.mark.traceback("uvloop logs one if a sentinel is given up in the middle of a handshake")
def test_all_runs_through_a_sentinel_with_a_password_and_tls_too(
    secure: SecureRedis, tmp_path: Path
) -> None:
    with secure.server() as port, secure.sentinel(port) as sentinel:
        url = (
            f"sentinel://asyncinfer:{ENCODED}@127.0.0.1:{sentinel}/main?ssl=true&sentinel_ssl=true"
            f"&sentinel_username=watcher&sentinel_password=watchword&{secure.options}"
        )
        serve_and_use(url, secure, tmp_path)
        for wrong, words in (
            (url.replace("watchword", "s3cret"), f"127.0.0.1:{sentinel}: it refuses the login"),
            (url.replace("&sentinel_ssl=true", ""), "this port speaks TLS. Add sentinel_ssl=true"),
            (url.replace("/main", "/other"), f"127.0.0.1:{sentinel} knows no service 'other'"),
            (
                url.replace("?ssl=true&", "?"),
                f"127.0.0.1:{port}: this port speaks TLS. Use rediss://",
            ),
            (url.replace(ENCODED, "s3cret"), "Redis refuses the login"),
        ):
            assert words in doctor(wrong).replace("\n         -> ", ". ")


def serve_and_use(url: str, secure: SecureRedis, tmp_path: Path) -> None:
    with open_services(tmp_path, REDIS_URL=url, DATA_DIR=str(tmp_path / "data")) as services:
        services.work()
        api = services.serve()
        context = secure.authority.server_context("127.0.0.1")
        with (
            tls_in_front_of(api, context) as port,
            Client(f"https://127.0.0.1:{port}", ca=secure.authority.certificate) as client,
        ):
            live_through_everything(client, services)
        assert "ok       Redis: Redis 7." in doctor(url)


def doctor(url: str) -> str:
    """What `doctor` prints; asserts that no part of a password is in it."""
    done = subprocess.run(
        [sys.executable, "-m", "asyncinfer", "doctor", "--redis-url", url],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert not any(part in printed for part in (*PARTS, "s3cret", "watchword"))
    return printed


@pytest.mark.parametrize("command", ["serve", "serve --work", "work"])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:{port}", "this port speaks TLS. Use rediss://"),
        ("rediss://127.0.0.1:{port}", "its certificate is not trusted"),
        ("rediss://127.0.0.1:{port}?ssl_ca_certs={ca}", "Give ssl_certfile and ssl_keyfile"),
        ("rediss://:s3cret@127.0.0.1:{port}?{options}", "Redis refuses the login"),
        ("rediss://asyncinfer:{password}@127.0.0.1:{port}/99?{options}", "has no database 99"),
        (
            "rediss://reader:{password}@127.0.0.1:{port}?{options}",
            "no permission to use a key that asyncinfer needs (NOPERM)",
        ),
    ],
)
def test_a_start_that_cannot_work_ends_with_one_line_that_says_why(
    command: str, url: str, words: str, secure: SecureRedis, tmp_path: Path
) -> None:
    with secure.server() as port, ExitStack() as stack:
        admin = stack.enter_context(secure.client(port, username="admin", password="secret"))
        admin.execute_command(f"ACL SETUSER reader on >{PASSWORD} %R~* +@all")
        filled = url.format(
            port=port,
            ca=secure.authority.certificate,
            options=secure.options,
            password=ENCODED,
        )
        program, *flags = command.split()
        where = ("--port", str(free_port())) if program == "serve" else ()
        done = subprocess.run(
            [sys.executable, "-m", "asyncinfer", program, *flags, *where, "--redis-url", filled],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("asyncinfer: ")
    assert words in line
    assert not any(part in line for part in (*PARTS, "s3cret"))
