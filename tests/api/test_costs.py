"""No request costs more than its size: refusing one is never dearer than accepting its size."""

import asyncio
import contextlib
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import pytest

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store

from .harness import hosted, raw_exchange, running
from .hostile_shapes import MODELS, filled, hostile, plain, plain_tensor

BODY_BYTES = 1_000_000
MAX_TIMES_PLAIN = 20
ROUNDS = 5

MAX_HOLD_SECONDS = 0.1
"""50 ms are promised on a machine that does nothing else."""
SHAPES = tuple(hostile(1000))

Request = tuple[str, str, bytes, dict[str, str]]
"""Method, path, body, headers."""

JSON = {"content-type": "application/json"}


@pytest.fixture
async def port(config: ApiConfig, store: Store) -> AsyncIterator[int]:
    await store.claim_default_model("digits")
    await Announcements(store).announce_models(
        {model: {"1": msgspec.json.encode(signature)} for model, signature in MODELS.items()}
    )
    async with hosted(running(config)) as port:
        yield port


def predict_request(model: str, body: bytes) -> Request:
    return "POST", f"/predict/{model}", body, JSON


def validate_request(model: str, body: bytes) -> Request:
    return "POST", f"/models/{model}/validate", body, JSON


def line_request(model: str, body: bytes) -> Request:
    """The body as a line of a bulk request; no body contains a line end."""
    return "POST", f"/predict/{model}", body + b"\n", {"content-type": "application/x-ndjson"}


def head_request(model: str, body: bytes) -> Request:
    """The body as the JSON at the start of a binary request."""
    return (
        "POST",
        f"/predict/{model}",
        body,
        {"inference-header-content-length": str(len(body))},
    )


REQUEST_MAKERS: dict[str, Callable[[str, bytes], Request]] = {
    "predict": predict_request,
    "validate": validate_request,
    "line": line_request,
    "head": head_request,
}


def as_bytes(request: Request) -> bytes:
    method, path, body, headers = request
    described = {
        "Host": "localhost",
        "Connection": "close",
        "Content-Length": str(len(body)),
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in described.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def cpu_seconds(port: int, request: Request) -> float:
    """The CPU time of one request in this process, which includes the server; a median."""
    sent = as_bytes(request)
    costs = []
    for _ in range(ROUNDS):
        began = time.process_time()
        answer = await exchange_bytes(port, sent)
        costs.append(time.process_time() - began)
        assert b" 50" not in answer[:12], answer
    return statistics.median(costs)


async def exchange_bytes(port: int, sent: bytes) -> bytes:
    """The answer, or nothing after a reset: a client that is refused early may still be writing."""
    with contextlib.suppress(ConnectionError):
        return await raw_exchange(port, sent)
    return b""


async def assert_cheap(port: int, requests: dict[str, Request], max_seconds: float) -> None:
    costs = {name: await cpu_seconds(port, request) for name, request in requests.items()}
    too_expensive = {
        name: f"{seconds:.3f} s" for name, seconds in costs.items() if seconds > max_seconds
    }
    assert not too_expensive, f"at most {max_seconds:.3f} s, 20 times what a plain request costs"


@pytest.mark.soak
@pytest.mark.parametrize("kind", REQUEST_MAKERS)
async def test_no_body_costs_more_than_20_plain_ones_of_its_size(port: int, kind: str) -> None:
    make_request = REQUEST_MAKERS[kind]
    ordinary = plain_tensor(BODY_BYTES) if kind == "head" else plain(BODY_BYTES)
    max_seconds = MAX_TIMES_PLAIN * await cpu_seconds(port, make_request("digits", ordinary))

    await assert_cheap(
        port,
        {name: make_request(*shape) for name, shape in hostile(BODY_BYTES).items()},
        max_seconds,
    )


async def test_nothing_but_a_body_can_be_long(port: int) -> None:
    """Queries, cursors and stream positions are refused by the size limit of the head."""
    max_seconds = MAX_TIMES_PLAIN * await cpu_seconds(
        port, predict_request("digits", plain(BODY_BYTES))
    )
    for size in (30_000, BODY_BYTES):
        text = "A" * size
        requests: dict[str, Request] = {
            "a cursor": ("GET", f"/jobs?cursor={text}", b"", {}),
            "dead letters' cursor": ("GET", f"/jobs?dead=true&cursor={text}", b"", {}),
            "a group's cursor": ("GET", f"/jobs?group=a&cursor={text}", b"", {}),
            "a position": ("GET", f"/events?last_event_id={text}", b"", {}),
            "a position in a head": ("GET", "/events", b"", {"last-event-id": text}),
            "many parameters": ("GET", "/jobs?" + "a=1&" * (size // 4), b"", {}),
            "one parameter many times": ("GET", "/jobs?" + "limit=1&" * (size // 8), b"", {}),
            "percent signs": ("GET", "/jobs?model=" + "%41" * (size // 3), b"", {}),
            "an option": ("POST", f"/predict?group={text}", b"{}", JSON),
            "an id": ("GET", f"/job/{text}", b"", {}),
            "a model": ("POST", f"/predict/{text}", b"{}", JSON),
            "a key": ("POST", "/predict", b"{}", {**JSON, "idempotency-key": text}),
            "a preference": (
                "POST",
                "/predict",
                b"{}",
                {**JSON, "prefer": "wait=1," * (size // 7)},
            ),
            "an accept": ("GET", "/job/a/result", b"", {"accept": "a/b," * (size // 4)}),
        }
        await assert_cheap(port, requests, max_seconds)


@pytest.mark.parametrize(
    "blank",
    [
        b"\n",
        pytest.param(b" \n", marks=pytest.mark.soak),
        pytest.param(b"\r\n", marks=pytest.mark.soak),
    ],
)
async def test_blank_lines_cost_next_to_nothing(port: int, blank: bytes) -> None:
    blanks = blank * (BODY_BYTES // len(blank))
    max_seconds = MAX_TIMES_PLAIN * await cpu_seconds(
        port, line_request("digits", plain(BODY_BYTES))
    )

    await assert_cheap(port, {"blank lines": line_request("digits", blanks)}, max_seconds)


@pytest.mark.soak
@pytest.mark.parametrize("refused", [b"x", b"{}", b'{"data":[[1]]}'])
async def test_short_lines_that_are_refused_cost_no_more_than_accepted_ones(
    port: int, refused: bytes
) -> None:
    row = b'{"data":[[' + b",".join([b"1"] * 64) + b"]]}"
    taken = filled(BODY_BYTES, b"", row, b"\n", b"\n")
    max_seconds = MAX_TIMES_PLAIN * await cpu_seconds(port, line_request("digits", taken))

    lines = filled(BODY_BYTES, b"", refused, b"\n", b"\n")
    await assert_cheap(port, {"refused lines": line_request("digits", lines)}, max_seconds)


async def test_strings_are_counted_while_they_are_read(port: int) -> None:
    """A binary tensor with four million empty strings, which its shape does not allow."""
    strings = bytes(16_000_000)
    described = b'{"inputs":[{"name":"input","shape":[4],"datatype":"BYTES","parameters":'
    json = described + b'{"binary_data_size":%d}}]}' % len(strings)
    headers = {"inference-header-content-length": str(len(json))}
    max_seconds = MAX_TIMES_PLAIN * await cpu_seconds(
        port, predict_request("digits", plain(BODY_BYTES))
    )

    strings_request: Request = ("POST", "/predict/words", json + strings, headers)
    await assert_cheap(port, {"strings": strings_request}, max_seconds)


# --- the event loop --------------------------------------------------------------------------


@contextlib.contextmanager
def posted_from_thread(port: int, path: str, body: bytes) -> Iterator[threading.Event]:
    """Sends a request from a thread, beside the event loop; sets the event once it is answered."""
    answered = threading.Event()

    def exchange() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % (path.encode(), len(body))
                + body
            )
            while connection.recv(65_536):
                pass
        answered.set()

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield answered
    finally:
        thread.join()


async def max_hold_seconds(port: int, path: str, body: bytes) -> float:
    """The longest CPU time between two turns of the event loop."""
    longest = 0.0
    with posted_from_thread(port, path, body) as answered:
        while not answered.is_set():
            began = time.process_time()
            await asyncio.sleep(0)
            longest = max(longest, time.process_time() - began)
    return longest


@pytest.mark.soak
async def test_the_largest_json_holds_the_event_loop_for_a_moment_only(
    port: int, config: ApiConfig
) -> None:
    size = config.max_json_bytes - 200
    requests = {
        "plain": ("digits", plain(size)),
        "plain tensor": ("digits", plain_tensor(size)),
        "one row of small numbers": ("series", b'{"data":[[1' + b",1" * (size // 2 - 10) + b"]]}"),
        **hostile(size),
    }
    hold_seconds = {}
    for name, (model, body) in requests.items():
        hold_seconds[name] = statistics.median(
            [await max_hold_seconds(port, f"/predict/{model}", body) for _ in range(ROUNDS)]
        )
    shown = {name: f"{1000 * seconds:.1f} ms" for name, seconds in hold_seconds.items()}
    assert max(hold_seconds.values()) < MAX_HOLD_SECONDS, shown
