"""One try to send a webhook: to the address that was checked, within bounds, and nowhere else."""

import base64
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from asyncinfer.webhooks.answers import Answer
from asyncinfer.webhooks.posting import Poster
from asyncinfer.webhooks.resolver import Resolver
from asyncinfer.webhooks.url_rules import UrlRules
from tests.certificates import Authority
from tests.faults.harness import eventually
from tests.webhooks.receiver import Receiver, Reply, receiver

BODY = b'{"type": "job.completed"}'


@contextmanager
def answering(
    head: bytes, endless: bytes = b"", tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """The port of a server that answers one request with bytes, then with others without end, or
    keeps the connection open."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with suppress(OSError), _over_tls(connection, tls) as stream:
                stream.recv(10_000)
                stream.sendall(head)
                while endless:
                    stream.sendall(endless)
                while stream.recv(10_000):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join()


def _over_tls(connection: socket.socket, tls: ssl.SSLContext | None) -> socket.socket:
    return tls.wrap_socket(connection, server_side=True) if tls else connection


async def posted(
    url: str, *allowed: str, resolver: Resolver | None = None, try_seconds: float = 10.0
) -> Answer:
    rules = UrlRules(allowed)
    async with Poster(rules, resolver or Resolver(), try_seconds=try_seconds) as poster:
        return await poster.post(rules.check(url), {"webhook-id": "msg_1"}, BODY)


async def test_a_webhook_arrives_as_it_was_given(hook: Receiver) -> None:
    answer = await posted(hook.url("/a/b?token=1"), hook.address)
    assert (answer.status, answer.failure) == (204, "")
    (request,) = hook.requests
    assert (request.path, request.body) == ("/a/b?token=1", BODY)
    assert request.headers["host"] == hook.address
    assert request.headers["webhook-id"] == "msg_1"


async def test_tls_is_verified_by_the_name_in_the_url(trusted: Authority) -> None:
    with receiver(trusted.server_context("localhost")) as server:
        assert (await posted(server.url(), server.address)).status == 204
        by_address = server.url().replace("localhost", "127.0.0.1")
        answer = await posted(by_address, f"127.0.0.1:{server.port}")
        assert (answer.status, answer.failure) == (0, "tls_failed")
    with receiver(trusted.server_context("other.example")) as server:
        assert (await posted(server.url(), server.address)).failure == "tls_failed"
    with receiver(trusted.server_context("localhost", is_expired=True)) as server:
        assert (await posted(server.url(), server.address)).failure == "tls_failed"
        assert not server.requests


async def test_a_certificate_of_an_unknown_authority_is_not_trusted(tmp_path: Path) -> None:
    with receiver(Authority(tmp_path).server_context("localhost")) as server:
        assert (await posted(server.url(), server.address)).failure == "tls_failed"


class ChangingName:
    """Answers of a name server that changes its mind with each question."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, name: str) -> Sequence[str]:
        self.asked += 1
        return self.answers.pop(0)


async def test_the_connection_goes_to_the_address_that_was_checked(hook: Receiver) -> None:
    names = ChangingName(["127.0.0.1"], ["127.0.0.2"])
    with receiver(host="127.0.0.2", port=hook.port) as elsewhere:
        url = hook.url(host="changing.example")
        answer = await posted(url, f"changing.example:{hook.port}", resolver=Resolver(names))
        assert answer.status == 204
        assert names.asked == 1
        assert len(hook.requests) == 1
        assert not elsewhere.requests


async def test_another_address_of_the_name_is_tried_if_one_refuses(hook: Receiver) -> None:
    names = ChangingName(["127.0.0.3", "127.0.0.1"])
    answer = await posted(hook.url(), hook.address, resolver=Resolver(names))
    assert answer.status == 204


async def test_a_name_that_comes_to_mean_an_inner_address_is_not_called(hook: Receiver) -> None:
    rules = UrlRules()
    target = rules.check(f"https://rebinding.example:{hook.port}/")
    names = ChangingName(
        *(["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["::1"], ["10.0.0.1"]),
        *(["8.8.8.8"] * 20 + ["169.254.169.254"], ["64:ff9b::127.0.0.1"]),
    )
    async with Poster(rules, Resolver(names)) as poster:
        while names.answers:
            answer = await poster.post(target, {}, BODY)
            assert (answer.status, answer.failure) == (0, "address_refused")
    assert not hook.requests


async def test_a_redirect_is_not_followed(hook: Receiver) -> None:
    with receiver() as inside:
        hook.behave = lambda _: Reply(307, {"location": inside.url()})
        assert (await posted(hook.url(), hook.address)).status == 307
        assert not inside.requests


async def test_no_proxy_is_taken_from_the_environment(
    hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await posted(hook.url(), hook.address)).status == 204


async def test_a_proxy_that_is_set_makes_the_connections(hook: Receiver) -> None:
    rules = UrlRules(["hooks.example:80"])
    names = ChangingName()
    async with Poster(rules, Resolver(names), proxy_url=f"http://127.0.0.1:{hook.port}") as poster:
        answer = await poster.post(rules.check("http://hooks.example/a"), {}, BODY)
    assert answer.status == 204
    assert hook.requests[0].path == "http://hooks.example:80/a"
    assert names.asked == 0


async def test_a_proxy_is_asked_for_a_tunnel_with_its_password() -> None:
    rules, heads = UrlRules(), list[bytes]()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                heads.append(connection.recv(10_000))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"http://user:p%40ss@127.0.0.1:{listener.getsockname()[1]}"
        async with Poster(rules, Resolver(ChangingName()), proxy_url=url) as poster:
            answer = await poster.post(rules.check("https://hooks.example.com/a"), {}, BODY)
        thread.join()
    assert (answer.status, answer.failure) == (0, "connection_failed")
    assert heads[0].startswith(b"CONNECT hooks.example.com:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"user:p@ss") in heads[0]


async def test_a_tunnel_of_a_proxy_reaches_the_receiver_and_is_used_again(
    trusted: Authority,
) -> None:
    with receiver(trusted.server_context("localhost")) as hook, tunnel(hook.port) as port:
        hook.behave = lambda _: Reply(200, {}, b"x" * 20_000)
        rules = UrlRules([hook.address])
        proxy_url = f"http://127.0.0.1:{port}"
        async with Poster(rules, Resolver(ChangingName()), proxy_url=proxy_url) as poster:
            for _ in range(10):
                answer = await poster.post(rules.check(hook.url()), {}, BODY)
                assert (answer.status, answer.failure) == (200, "")
        assert hook.connections == 1


@contextmanager
def tunnel(port: int) -> Iterator[int]:
    """The port of a proxy that connects one client with a port here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                assert client.recv(10_000).startswith(b"CONNECT localhost:")
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                back = threading.Thread(target=pass_on, args=(server, client))
                back.start()
                pass_on(client, server)
                back.join()

        thread = threading.Thread(target=relay)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join()


def pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


async def test_a_receiver_that_hangs_is_left_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        answer = await posted(f"http://localhost:{port}/", f"localhost:{port}", try_seconds=0.2)
        assert answer.failure == "timeout"
        assert 190 <= answer.duration_ms < 5000
        assert time.monotonic() - began < 5


async def test_only_a_part_of_a_large_answer_is_read(hook: Receiver) -> None:
    hook.behave = lambda _: Reply(200, {}, b"x" * (64 << 20))
    answer = await posted(hook.url(), hook.address)
    assert answer.status == 200
    await eventually(lambda: hook.broken == 1, "the receiver cannot send the rest")


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "headers": (b"HTTP/1.1 200 OK\r\n", b"x: " + b"y" * 1000 + b"\r\n", 0),
    "a header": (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 1000, 0),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, 0),
    "chunks": (CHUNKED, b"1\r\nx\r\n" * 20_000, 200),
    "a size of a chunk": (CHUNKED, b"0" * 1000, 200),
    "trailers": (CHUNKED + b"0\r\n", b"x: y\r\n" * 1000, 200),
    "a body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 100_000, 200),
}


@pytest.mark.parametrize("is_secure", [False, True])
@pytest.mark.parametrize("what", ENDLESS)
async def test_an_answer_without_end_costs_little(
    what: str, is_secure: bool, trusted: Authority
) -> None:
    head, endless, status = ENDLESS[what]
    tls = trusted.server_context("localhost") if is_secure else None
    with answering(head, endless, tls) as port:
        url = f"{'https' if is_secure else 'http'}://localhost:{port}/"
        began_seconds = time.thread_time()
        answer = await posted(url, f"localhost:{port}")
        cpu_seconds = time.thread_time() - began_seconds
    assert (answer.status, answer.failure) == (status, "" if status else "no_valid_answer")
    assert answer.duration_ms < 5000
    assert cpu_seconds < 0.1


async def test_a_byte_at_a_time_is_not_waited_for() -> None:
    """Each read costs time, however little it brings."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                while True:
                    connection.sendall(b"y")
                    time.sleep(0.001)  # so that each byte is a packet of its own

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        answered = await posted(f"http://localhost:{port}/", f"localhost:{port}")
        thread.join()
    assert answered.failure == "no_valid_answer"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        CHUNKED + b"1\r\nx",
        CHUNKED + b"no size\r\n",
    ],
)
async def test_the_status_counts_whatever_becomes_of_the_body(answer: bytes) -> None:
    with answering(answer) as port:
        url = f"http://localhost:{port}/"
        answered = await posted(url, f"localhost:{port}", try_seconds=5.0)
    assert (answered.status, answered.failure) == (200, "")
    assert answered.duration_ms < 2500


async def test_a_connection_is_used_again_after_a_short_answer(hook: Receiver) -> None:
    hook.behave = lambda _: Reply(200, {}, b'{"ok": true}\n')
    rules = UrlRules([hook.address])
    async with Poster(rules, Resolver()) as poster:
        for _ in range(20):
            assert (await poster.post(rules.check(hook.url()), {}, BODY)).status == 200
    assert hook.connections == 1


async def test_failures_have_words(hook: Receiver) -> None:
    hook.behave = lambda _: None
    assert (await posted(hook.url(), hook.address)).failure == "no_valid_answer"
    port = hook.port
    hook.behave = lambda _: Reply(503, {"Retry-After": "120"}, b"later")
    answer = await posted(hook.url(), hook.address)
    assert (answer.status, answer.retry_after_seconds) == (503, 120.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    answer = await posted(f"http://localhost:{port}/", f"localhost:{port}")
    assert answer.failure == "connection_failed"

    def no_such_name(name: str) -> Sequence[str]:
        raise OSError(name)

    answer = await posted("https://a.example/", resolver=Resolver(no_such_name))
    assert answer.failure == "name_not_resolved"
