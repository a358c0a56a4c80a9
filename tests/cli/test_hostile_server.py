"""A server that answers in wrong types: every command says so in one line, without a traceback."""

import copy
import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import pytest

from tests.cli.command_line import Told, told

from .conftest import ended, submitted

Place = tuple[str | int, ...]

WRONG: Final[tuple[Any, ...]] = (None, 7, -1.5, True, "x", "\x1b[31m", [], [None], {}, {"x": None})
COMMANDS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "GET /jobs": (("jobs",), ("dead",), ("jobs", "--all-tenants"), ("jobs", "--json")),
    "GET /job": (
        ("job", "a"),
        ("job", "a", "--watch", "--timeout", "0"),
        ("job", "a", "--json"),
    ),
    "GET /models": (("models",), ("models", "--json"), ("predict", "1", "2", "3", "4")),
    "GET /models/iris": (("models", "iris"), ("predict", "-m", "iris", "1", "2", "3", "4")),
    "GET /queues": (("top", "--once"), ("top", "--once", "--json")),
    "GET /workers": (("top", "--once"),),
    "GET /group": (("predict", "-m", "iris", "1", "2", "3", "4"),),
    "POST /predict": (
        ("predict", "-m", "iris", "1", "2", "3", "4"),
        ("predict", "-m", "iris", "1", "2", "3", "4", "--to", "csv"),
    ),
    "DELETE /jobs": (("cancel", "--model", "x"), ("purge", "--status", "ended", "--json")),
    "DELETE /job": (("cancel", "a"), ("purge", "a")),
    "POST /jobs/retry": (("retry", "a"), ("retry", "--dead"), ("retry", "--dead", "--json")),
    "POST /models/iris/pause": (("pause", "iris"), ("pause", "iris", "--json")),
}


class Hostile(ThreadingHTTPServer):
    """Answers `answers`, by method and path, with `status`."""

    daemon_threads = True
    answers: dict[str, Any]
    status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str) -> Any:
        asked = f"{method} {path.partition('?')[0]}"
        named = (it for it in self.answers if asked == it or asked.startswith(f"{it}/"))
        return self.answers.get(max(named, key=len, default=""), {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: a second one would wait for the acknowledgement
    server: Hostile

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


@pytest.fixture(scope="module")
def answered(running: Any) -> dict[str, Any]:
    """What a real service answers."""

    def ask(method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "prefer": "wait=10"}
        request = urllib.request.Request(f"{running.url}{path}", content, headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.load(reply)

    job_id = ended(running.url, submitted(running.url))
    job = ask("GET", f"/job/{job_id}")
    failed = {"error": {"code": "model_failed", "message": "It did."}, "status": "failed"}
    job["waiting_for"] = failed["waiting_for"] = {"code": "no_worker", "message": "None has it."}
    jobs = {**ask("GET", "/jobs?limit=1"), "cursor": None}
    jobs["jobs"].append({**jobs["jobs"][0], **failed})
    refused = {"job_id": "b", "code": "job_not_found", "detail": "There is none."}
    models = {**ask("GET", "/models"), "loading": []}
    problem = {"model": "iris", "version": "2", "worker": "w-1", "reason": "It is broken."}
    models["problems"] = models["models"][0]["problems"] = [problem]
    return {
        "GET /jobs": jobs,
        "GET /job": job,
        "GET /models": models,
        "GET /models/iris": {**ask("GET", "/models/iris"), "problems": [problem]},
        "GET /queues": ask("GET", "/queues"),
        "GET /workers": ask("GET", "/workers"),
        "GET /group": {"group": "x", "jobs": 0},
        "POST /predict": ask("POST", "/predict/iris", {"data": [[5.1, 3.5, 1.4, 0.2]]}),
        "DELETE /jobs": {"cancelled": 1, "stopping": 0, "purged": 2, "more": False},
        "DELETE /job": {**job, "status": "cancelled"},
        "POST /jobs/retry": {"retried": [job_id], "refused": [refused], "more": False},
        "POST /models/iris/pause": {"model": "iris", "paused": True},
    }


@pytest.fixture
def hostile(answered: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    with Hostile(("127.0.0.1", 0), _Handler) as server:
        server.answers = copy.deepcopy(answered)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("ASYNCINFER_URL", server.url)
        yield server
        server.shutdown()
        thread.join()


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Everything in it, itself included; of a long list the first two."""
    yield at
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, one in items:
        yield from places(one, (*at, key))


def wrong_places(value: Any) -> Iterator[Place]:
    """Not where true is right: a server that always has more to do is asked for more."""
    return (place for place in places(value) if place != ("more",))


def with_wrong(value: Any, place: Place, wrong: Any) -> Any:
    if not place:
        return wrong
    changed = copy.deepcopy(value)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = wrong
    return changed


def refuses_or_shows(argv: tuple[str, ...]) -> Told:
    """A value may be one that is shown; any other ends with one line and exit code 3."""
    ran = told(*argv)
    assert "\x1b" not in ran.err
    if ran.code == 3:
        assert len(ran.err.splitlines()) == 1
        assert ran.err.startswith("asyncinfer: ")
    else:
        assert ran.code in (0, 1, 4)
    return ran


@pytest.mark.parametrize("asked", COMMANDS)
def test_the_answers_that_the_hostile_server_changes_are_good_ones(
    hostile: Hostile, asked: str
) -> None:
    for argv in COMMANDS[asked]:
        assert told(*argv).code in (0, 1)


@pytest.mark.parametrize("asked", COMMANDS)
def test_no_wrong_type_in_an_answer_ends_in_a_traceback(hostile: Hostile, asked: str) -> None:
    good = hostile.answers[asked]
    for number, place in enumerate(wrong_places(good)):
        hostile.answers[asked] = with_wrong(good, place, WRONG[number % len(WRONG)])
        for argv in COMMANDS[asked]:
            refuses_or_shows(argv)


def test_an_axis_that_a_model_has_not_is_refused(hostile: Hostile) -> None:
    model = hostile.answers["GET /models/iris"]
    for axis in (-1, 7):
        hostile.answers["GET /models/iris"] = {**model, "input_axes": [axis]}
        assert refuses_or_shows(("predict", "-m", "iris", "1", "2", "3", "4")).code == 3


def test_an_output_that_declares_fewer_dimensions_than_it_has_hides_no_model(
    hostile: Hostile,
) -> None:
    """As a worker of an earlier release announces what a converter declared wrongly."""
    model = hostile.answers["GET /models/iris"]
    outputs = [{**one, "shape": []} for one in model["outputs"]]
    odd = {**model, "outputs": outputs, "output_axes": [0] * len(outputs)}
    hostile.answers["GET /models/iris"] = odd
    hostile.answers["GET /models"] = {**hostile.answers["GET /models"], "models": [odd]}

    assert told("models").code == 0
    assert told("predict", "-m", "iris", "1", "2", "3", "4").code in (0, 1)


@pytest.mark.soak
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("asked", COMMANDS)
def test_no_wrong_type_anywhere_ends_in_a_traceback(
    hostile: Hostile, asked: str, wrong: Any
) -> None:
    good = hostile.answers[asked]
    for place in wrong_places(good):
        hostile.answers[asked] = with_wrong(good, place, wrong)
        for argv in COMMANDS[asked]:
            refuses_or_shows(argv)


PROBLEM: Final = {
    "type": "about:blank",
    "title": "It is wrong",
    "status": 422,
    "detail": "Wrong.",
    "code": "invalid_input",
    "job_id": "a",
    "error": {"code": "a", "message": "b"},
    "errors": [{"pointer": "/data/0", "detail": "has no row"}],
}


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("code", ["invalid_input", "job_failed", "model_not_found", "x"])
def test_no_wrong_type_in_an_error_ends_in_a_traceback(
    hostile: Hostile, code: str, wrong: Any
) -> None:
    hostile.status = 422
    good = {**PROBLEM, "code": code}
    for place in places(good):
        hostile.answers = {"GET ": None, "GET": None}
        changed = with_wrong(good, place, wrong)
        hostile.answers = dict.fromkeys(COMMANDS, changed)
        for argv in (("jobs",), ("predict", "-m", "iris", "1", "2"), ("cancel", "a")):
            assert told(*argv).code in (1, 2, 3)
