"""A collector of OpenTelemetry: takes in spans over HTTP, or is silent."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """The spans that were received, by the `service.instance.id` of the process that made them."""

    def __init__(self, *, silent: bool) -> None:
        self.names: dict[str, list[str]] = {}
        self.services: dict[str, str] = {}
        """The `service.name` of each process."""
        self.requests = 0
        self.is_closing = threading.Event()
        self._silent = silent
        self._lock = threading.Lock()

    def take(self, body: bytes) -> None:
        self.requests += 1
        if self._silent:
            self.is_closing.wait()
            return
        request = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            for resource in request.resource_spans:
                said = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                process = said["service.instance.id"]
                self.services[process] = said["service.name"]
                for scope in resource.scope_spans:
                    self.names.setdefault(process, []).extend(span.name for span in scope.spans)

    def count(self, word: str) -> int:
        """How many spans were received whose name begins with the word."""
        return sum(name.split(" ")[0] == word for names in self.names.values() for name in names)


@contextmanager
def running_collector(*, silent: bool = False) -> Iterator[tuple[Collector, str]]:
    """A collector and its URL; a silent one accepts connections and never answers."""
    collector = Collector(silent=silent)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector, f"http://127.0.0.1:{server.server_port}"
    finally:
        collector.is_closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
