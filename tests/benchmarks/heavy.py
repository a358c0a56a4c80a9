"""`python -m tests.benchmarks.heavy`: clients with images and a model that keeps all cores busy, on
`asyncinfer serve` alone. Prints every status, the times, and the share of ONNX Runtime alone."""

import argparse
import asyncio
import io
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from msgspec import Struct, field
from onnx import TensorProto, helper, numpy_helper

from asyncinfer.processes import child_process
from tests.benchmarks.systems import answers, until
from tests.ports import free_port

_SIDES: Final = (320, 400, 500)
"""Pixels; images of 1.2, 1.9 and 3 MB."""

_CHANNELS: Final = (3, 16, 32, 64)
_PROBE_SECONDS: Final = 0.05
_BARE_SECONDS: Final = 4.0
_JOB_ID: Final = re.compile(rb'"job_id": ?"([^"]+)"')
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

Image = npt.NDArray[np.float32]


class Outcome(Struct):
    """What the clients saw."""

    submits: Counter[bytes] = field(default_factory=Counter)
    """How often a submit was answered with each status."""
    refused_ids: list[bytes] = field(default_factory=list)
    """The jobs that answers other than 202 name."""
    stored_though_refused: int = 0
    ends: Counter[bytes] = field(default_factory=Counter)
    """How often a job that was waited for was in each state."""
    submit_seconds: list[float] = field(default_factory=list)
    live_seconds: list[float] = field(default_factory=list)


class _Connection:
    """A connection that sends a request after the last answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, request: bytes) -> tuple[bytes, bytes]:
        """The status and the body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        assert length, f"an answer without a length: {head!r}"
        body = await reader.readexactly(int(length[1]))
        if b"connection: close" in head.lower():
            writer.close()
            self._streams = None
        return head[9:12], body


def _post(body: bytes) -> bytes:
    head = (
        "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-npy\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _get(path: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path


async def _submit_and_wait(port: int, posts: list[bytes], until_s: float, seen: Outcome) -> None:
    """One client: submits an image and waits until its job has ended, again and again."""
    connection, turn = _Connection(port), 0
    while time.monotonic() < until_s:
        began = time.monotonic()
        status, body = await connection.exchange(posts[turn % len(posts)])
        seen.submit_seconds.append(time.monotonic() - began)
        seen.submits[status] += 1
        turn += 1
        job_id = _JOB_ID.search(body)
        if status != b"202":
            seen.refused_ids += [job_id[1]] if job_id else []
            continue
        assert job_id, body
        status, body = await connection.exchange(_get(b"/job/%b?wait=30" % job_id[1]))
        state = re.search(rb'"status": ?"?(\w+)', body)
        seen.ends[state[1] if state and status == b"200" else status] += 1


async def _probe(port: int, seen: Outcome) -> None:
    """Asks whether the API is live, again and again, as a kubelet does."""
    connection = _Connection(port)
    while True:
        began = time.monotonic()
        status, _ = await connection.exchange(_get(b"/health/live"))
        assert status == b"200", status
        seen.live_seconds.append(time.monotonic() - began)
        await asyncio.sleep(_PROBE_SECONDS)


async def _load(
    port: int, images: list[Image], clients: int, seconds: float, seen: Outcome
) -> None:
    posts = [_post(_npy(image)) for image in images]
    until_s = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        probe = group.create_task(_probe(port, seen))
        async with asyncio.TaskGroup() as senders:
            for number in range(clients):
                turned = posts[number % len(posts) :] + posts[: number % len(posts)]
                senders.create_task(_submit_and_wait(port, turned, until_s, seen))
        probe.cancel()


async def _count_stored(port: int, refused_ids: Sequence[bytes]) -> int:
    connection = _Connection(port)
    answers = [await connection.exchange(_get(b"/job/" + job_id)) for job_id in refused_ids]
    return sum(status == b"200" for status, _ in answers)


def _npy(image: Image) -> bytes:
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def _images(sides: Sequence[int]) -> list[Image]:
    random = np.random.default_rng(0)
    return [random.uniform(size=(1, 3, side, side)).astype(np.float32) for side in sides]


def _model(width: int) -> onnx.ModelProto:
    """Convolutions over an image of any size; `width` multiplies their channels."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    channels = [3, *(width * count for count in _CHANNELS[1:])]
    for layer, (wide, out) in enumerate(pairwise(channels)):
        weight = random.normal(size=(out, wide, 3, 3)).astype(np.float32) / (3 * wide**0.5)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], strides=[2, 2]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["p"]))
    nodes.append(helper.make_node("Flatten", ["p"], ["y"]))
    shape: list[str | int | None] = ["batch", 3, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", channels[-1]])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


class Bare:
    """ONNX Runtime alone, in as many threads as the worker has slots."""

    def __init__(self, model: bytes, images: list[Image], threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self._images = images
        self._threads = threads

    def run_ms(self) -> float:
        """The median milliseconds of a run with no other beside it."""
        times = []
        for image in self._images * 5:
            began = time.monotonic()
            self._session.run(None, {"x": image})
            times.append(time.monotonic() - began)
        return 1000 * statistics.median(times)

    def per_second(self) -> float:
        """Measures for some seconds how many runs end in a second."""
        began = time.monotonic()

        def run(offset: int) -> int:
            count = 0
            while time.monotonic() < began + _BARE_SECONDS:
                image = self._images[(offset + count) % len(self._images)]
                self._session.run(None, {"x": image})
                count += 1
            return count

        with ThreadPoolExecutor(self._threads) as pool:
            total = sum(pool.map(run, range(self._threads)))
        return total / (time.monotonic() - began)


async def _measure(arguments: argparse.Namespace) -> None:
    images = _images(arguments.sides)
    model = _model(arguments.width).SerializeToString()
    slots = len(os.sched_getaffinity(0))
    bare, seen = Bare(model, images, slots), Outcome()
    rates: list[float] = []
    bare_rates: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models" / "heavy" / "1").mkdir(parents=True)
        (folder / "models" / "heavy" / "1" / "model.onnx").write_bytes(model)
        port = free_port()
        environ = {**os.environ, "PORT": str(port), "DATA_DIR": str(folder / "data")}
        environ |= {"MODEL_DIR": str(folder / "models"), "CONCURRENCY": str(slots)}
        argv = (sys.executable, "-m", "asyncinfer", "serve")
        with (folder / "output.log").open("wb") as output:
            child = child_process.spawn(
                argv, death_signal=signal.SIGTERM, env=environ, output=output
            )
            try:
                await until(lambda: answers(port, "/models/heavy"), "the model")
                bare_rates.append(bare.per_second())
                for _ in range(arguments.rounds):
                    before, began = seen.ends[b"completed"], time.monotonic()
                    seconds = arguments.seconds / arguments.rounds
                    await _load(port, images, arguments.clients, seconds, seen)
                    completed = seen.ends[b"completed"] - before
                    rates.append(completed / (time.monotonic() - began))
                    bare_rates.append(bare.per_second())
                seen.stored_though_refused = await _count_stored(port, seen.refused_ids)
            finally:
                await child.stop(10)
        log = (folder / "output.log").read_text()
    warnings = re.findall(r"^.*(?:WARNING|ERROR).*$", log, re.MULTILINE)
    _print(seen, rates, bare_rates, bare.run_ms(), warnings)


def _print(
    seen: Outcome,
    rates: Sequence[float],
    bare_rates: Sequence[float],
    run_ms: float,
    warnings: Sequence[str],
) -> None:
    """Each round of the load is compared with the bare runs before and after it, since a machine's
    speed drifts."""
    bare = [statistics.mean(pair) for pair in pairwise(bare_rates)]
    shares = [rate / alone for rate, alone in zip(rates, bare, strict=True)]
    times = sorted(seen.submit_seconds)
    rows = {
        "submits": {key.decode(): count for key, count in seen.submits.items()},
        "jobs waited for": {key.decode(): count for key, count in seen.ends.items()},
        "refused but stored": f"{seen.stored_though_refused} of {len(seen.refused_ids)}",
        "submit p50 s": round(times[len(times) // 2], 3),
        "submit p99 s": round(times[int(len(times) * 0.99)], 3),
        "submit longest s": round(times[-1], 3),
        "live longest s": round(max(seen.live_seconds), 3),
        "completed per second": [round(rate, 2) for rate in rates],
        "bare runs per second": [round(rate, 2) for rate in bare_rates],
        "bare run ms": round(run_ms, 1),
        "share of bare": [round(statistics.median(shares), 3), *(round(x, 3) for x in shares)],
        "warnings": [len(warnings), *warnings[:5]],
    }
    for name, value in rows.items():
        sys.stdout.write(f"{name}: {value}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.heavy", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="bare runs are between them")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--sides", type=int, nargs="+", default=_SIDES, help="of images, in pixels")
    parser.add_argument("--width", type=int, default=4, help="more take longer runs")
    asyncio.run(_measure(parser.parse_args()))


if __name__ == "__main__":
    main()
