"""A server that answers as a test tells it: with wrong types, statuses or control characters."""

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .submitted_jobs import submit, wait_until_ended


class HostileServer(ThreadingHTTPServer):
    """A server that answers with `answers`, by method and path, and with `status`."""

    daemon_threads = True
    answers: dict[str, Any]
    status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str) -> Any:
        request = f"{method} {path.partition('?')[0]}"
        # That of any job: a wrong id in the answer on a job is asked for in the next request.
        request = re.sub("/job/[^/]+/webhook$", "/webhook", request)
        matches = (key for key in self.answers if request == key or request.startswith(f"{key}/"))
        return self.answers.get(max(matches, key=len, default=""), {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer: a second packet would wait for the acknowledgement
    server: HostileServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        content = json.dumps(self.server.answer(self.command, self.path)).encode()
        if self.headers.get("content-type") == "application/x-ndjson":
            content = b"\n".join([content] * len(body.splitlines()))
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hostile_server(answers: dict[str, Any]) -> Iterator[HostileServer]:
    """Runs a server with these answers, in a thread, until the block ends."""
    with HostileServer(("127.0.0.1", 0), _Handler) as server:
        server.answers = answers
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def webhook_of(status: str, http_status: int = 503) -> dict[str, Any]:
    """The answer on the webhook of a job whose delivery was tried twice and has a status."""
    at = "2026-11-28T19:51:27.000000Z"
    tries = [
        {"at": at, "status": None, "error": "no answer", "seconds": 10.0},
        {"at": at, "status": http_status, "error": None, "seconds": 0.1},
    ]
    delivery = {
        **{"webhook_id": "x", "round": 1, "event": "completed", "status": status, "tries": 2},
        **{"next_at": at if status == "pending" else None, "attempts": tries},
    }
    return {
        **{"job_id": "a", "url": "https://hook.example/in", "events": ["completed", "failed"]},
        "deliveries": [delivery],
    }


def answers_of(url: str) -> dict[str, Any]:
    """The answers of a real service at `url`, by method and path."""

    def send(method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "prefer": "wait=10"}
        request = urllib.request.Request(f"{url}{path}", content, headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.load(reply)

    for verb in ("pause", "resume"):
        send("POST", f"/models/iris/{verb}", {})
    job_id = wait_until_ended(url, submit(url))
    job = send("GET", f"/job/{job_id}")
    failed = {"error": {"code": "model_failed", "message": "It did."}, "status": "failed"}
    job["waiting_for"] = failed["waiting_for"] = {"code": "no_worker", "message": "None has it."}
    jobs = {**send("GET", "/jobs?limit=1"), "cursor": None}
    jobs["jobs"].append({**jobs["jobs"][0], **failed})
    refused = {"job_id": "b", "code": "job_not_found", "detail": "There is none."}
    models = {**send("GET", "/models"), "loading": []}
    problem = {"model": "iris", "version": "2", "worker": "w-1", "reason": "It is broken."}
    models["problems"] = models["models"][0]["problems"] = [problem]
    return {
        "GET /jobs": jobs,
        "GET /job": job,
        "GET /webhook": webhook_of("pending"),
        "GET /models": models,
        "GET /models/iris": {**send("GET", "/models/iris"), "problems": [problem]},
        "GET /queues": send("GET", "/queues"),
        "GET /audit": {**send("GET", "/audit?limit=2"), "unreadable": 1, "cursor": None},
        "GET /workers": send("GET", "/workers"),
        "GET /group": {"group": "x", "jobs": 0},
        "POST /predict": send("POST", "/predict/iris", {"data": [[5.1, 3.5, 1.4, 0.2]]}),
        "DELETE /jobs": {"cancelled": 1, "stopping": 0, "purged": 2, "more": False},
        "DELETE /job": {**job, "status": "cancelled"},
        "POST /jobs/retry": {"retried": [job_id], "refused": [refused], "more": False},
        "POST /models/iris/pause": {"model": "iris", "paused": True},
    }
