"""A real HTTP(S) server that receives webhooks and keeps what it got."""

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import msgspec

from tests.faults.harness import eventually_sync


class Received(msgspec.Struct, frozen=True):
    """One request as it arrived; names of headers are in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        return msgspec.json.decode(self.body, type=dict[str, Any])


class Reply(msgspec.Struct, frozen=True):
    """What a receiver answers."""

    status: int = 204
    headers: Mapping[str, str] = {}
    body: bytes = b""


Behaviour = Callable[[Received], Reply | None]
"""Returns the answer to a request; None cuts the connection."""


class Receiver:
    """A receiver on `host`, which answers 204 until it is told otherwise."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self.broken = 0
        """Connections that ended with an error."""
        self.behave: Behaviour = lambda _: Reply()
        self.names = ["localhost"]
        """Host names under which a sender may call it."""
        self._server = _Server((host, port), _Handler)
        self._server.receiver = self
        self._tls = tls
        if tls:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        """What WEBHOOK_ALLOW has of it."""
        return f"localhost:{self.port}"

    def url(self, path: str = "/hook", host: str = "localhost") -> str:
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}"

    def wait_for(self, count: int, what: str = "the webhooks arrive") -> list[Received]:
        eventually_sync(lambda: len(self.requests) >= count, what)
        return list(self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def receiver(
    tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
) -> Iterator[Receiver]:
    """A receiver that is closed at the end of the block; the port 0 means any."""
    server = Receiver(host, port, tls)
    try:
        yield server
    finally:
        server.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    receiver: Receiver

    def process_request(self, *connection: Any) -> None:
        self.receiver.connections += 1
        super().process_request(*connection)

    def handle_error(self, *_: object) -> None:
        """A client that goes away, or that trusts no certificate, is part of a test."""
        self.receiver.broken += 1


_MAX_BODY_BYTES: Final = 1 << 20


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        size_bytes = int(self.headers.get("content-length", 0))
        assert size_bytes <= _MAX_BODY_BYTES
        headers = {name.lower(): value for name, value in self.headers.items()}
        received = Received(self.path, headers, self.rfile.read(size_bytes))
        receiver = self.server.receiver
        receiver.requests.append(received)
        reply = receiver.behave(received)
        if reply is None:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status != 204:
            self.send_header("content-length", str(len(reply.body)))
        self.end_headers()
        if reply.status != 204:
            self.wfile.write(reply.body)

    def log_message(self, *_: object) -> None:
        """Says nothing on stderr."""
