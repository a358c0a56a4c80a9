"""No request costs more than its size: what is refused is refused for less than is taken in."""

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
MOST_TIMES_PLAIN = 20
ROUNDS = 5

MOST_HELD_SECONDS = 0.1
"""50 ms are promised, on a machine that does nothing else."""
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


def predicted(model: str, body: bytes) -> Request:
    return "POST", f"/predict/{model}", body, JSON


def validated(model: str, body: bytes) -> Request:
    return "POST", f"/models/{model}/validate", body, JSON


def line(model: str, body: bytes) -> Request:
    """As one line of many; none has a line end in it."""
    return "POST", f"/predict/{model}", body + b"\n", {"content-type": "application/x-ndjson"}


def head(model: str, body: bytes) -> Request:
    """As the JSON that a binary request begins with."""
    return (
        "POST",
        f"/predict/{model}",
        body,
        {"inference-header-content-length": str(len(body))},
    )


DOORS: dict[str, Callable[[str, bytes], Request]] = {
    "predict": predicted,
    "validate": validated,
    "line": line,
    "head": head,
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
    """What one request costs this process, in which the server is; the median of some."""
    sent = as_bytes(request)
    costs = []
    for _ in range(ROUNDS):
        began = time.process_time()
        answer = await exchanged(port, sent)
        costs.append(time.process_time() - began)
        assert b" 50" not in answer[:12], answer
    return statistics.median(costs)


async def exchanged(port: int, sent: bytes) -> bytes:
    """The answer, if it comes before a reset: who is refused early may still be writing."""
    with contextlib.suppress(ConnectionError):
        return await raw_exchange(port, sent)
    return b""


async def assert_cheap(port: int, asked: dict[str, Request], most: float) -> None:
    costs = {name: await cpu_seconds(port, request) for name, request in asked.items()}
    dear = {name: f"{seconds:.3f} s" for name, seconds in costs.items() if seconds > most}
    assert not dear, f"at most {most:.3f} s, 20 times what a plain request costs"


@pytest.mark.parametrize(
    "door",
    ["predict", *(pytest.param(one, marks=pytest.mark.soak) for one in DOORS if one != "predict")],
)
async def test_no_body_costs_more_than_20_plain_ones_of_its_size(port: int, door: str) -> None:
    knock = DOORS[door]
    ordinary = plain_tensor(BODY_BYTES) if door == "head" else plain(BODY_BYTES)
    most = MOST_TIMES_PLAIN * await cpu_seconds(port, knock("digits", ordinary))

    await assert_cheap(
        port, {name: knock(*shape) for name, shape in hostile(BODY_BYTES).items()}, most
    )


async def test_nothing_but_a_body_can_be_long(port: int) -> None:
    """Queries, cursors and positions in a stream are refused by the size of their head."""
    most = MOST_TIMES_PLAIN * await cpu_seconds(port, predicted("digits", plain(BODY_BYTES)))
    for size in (30_000, BODY_BYTES):
        text = "A" * size
        asked: dict[str, Request] = {
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
        await assert_cheap(port, asked, most)


@pytest.mark.parametrize("blank", [b"\n", b" \n", b"\r\n"])
async def test_blank_lines_cost_next_to_nothing(port: int, blank: bytes) -> None:
    blanks = blank * (BODY_BYTES // len(blank))
    most = MOST_TIMES_PLAIN * await cpu_seconds(port, line("digits", plain(BODY_BYTES)))

    await assert_cheap(port, {"blank lines": line("digits", blanks)}, most)


@pytest.mark.soak
@pytest.mark.parametrize("refused", [b"x", b"{}", b'{"a":1}', b'{"data":[[1]]}', b'"\xff"'])
async def test_short_lines_that_are_refused_cost_no_more_than_such_that_are_taken(
    port: int, refused: bytes
) -> None:
    row = b'{"data":[[' + b",".join([b"1"] * 64) + b"]]}"
    taken = filled(BODY_BYTES, b"", row, b"\n", b"\n")
    most = MOST_TIMES_PLAIN * await cpu_seconds(port, line("digits", taken))

    lines = filled(BODY_BYTES, b"", refused, b"\n", b"\n")
    await assert_cheap(port, {"refused lines": line("digits", lines)}, most)


async def test_strings_are_counted_while_they_are_read(port: int) -> None:
    """A binary tensor of strings that its shape does not take: four million empty ones."""
    strings = bytes(16_000_000)
    described = b'{"inputs":[{"name":"input","shape":[4],"datatype":"BYTES","parameters":'
    json = described + b'{"binary_data_size":%d}}]}' % len(strings)
    headers = {"inference-header-content-length": str(len(json))}
    most = MOST_TIMES_PLAIN * await cpu_seconds(port, predicted("digits", plain(BODY_BYTES)))

    asked: Request = ("POST", "/predict/words", json + strings, headers)
    await assert_cheap(port, {"strings": asked}, most)


# --- the event loop --------------------------------------------------------------------------


@contextlib.contextmanager
def sent_from_a_thread(port: int, path: str, body: bytes) -> Iterator[threading.Event]:
    """A request that is sent and answered beside the event loop; the event says that it was."""
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


async def longest_hold_seconds(port: int, path: str, body: bytes) -> float:
    """The most CPU time that went by between two turns of the event loop."""
    longest = 0.0
    with sent_from_a_thread(port, path, body) as answered:
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
    asked = {
        "plain": ("digits", plain(size)),
        "plain tensor": ("digits", plain_tensor(size)),
        "one row of small numbers": ("series", b'{"data":[[1' + b",1" * (size // 2 - 10) + b"]]}"),
        **hostile(size),
    }
    held = {}
    for name, (model, body) in asked.items():
        held[name] = statistics.median(
            [await longest_hold_seconds(port, f"/predict/{model}", body) for _ in range(ROUNDS)]
        )
    shown = {name: f"{1000 * seconds:.1f} ms" for name, seconds in held.items()}
    assert max(held.values()) < MOST_HELD_SECONDS, shown
