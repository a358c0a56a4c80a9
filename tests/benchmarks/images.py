"""A tensor of 1x3x224x224 float32 from submit to result: as JSON, and as binary data."""

import json
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.benchmarks import load
from tests.benchmarks.load import Plan
from tests.benchmarks.scale import Figures, Workspace
from tests.benchmarks.systems import Service, peak_mib, reset_peak_mib, running, usage

_SIDE: Final = 224
_REQUESTS: Final = 100
_CONNECTIONS: Final = 4
_JSON: Final = "Content-Type: application/json"


async def forms(workspace: Workspace) -> Figures:
    """Requests per second in both forms, and the memory growth of each process by one request."""
    folder = workspace.new_folder()
    _place(folder, "image", _SIDE)
    _place(folder, "stamp", 8)
    figures: Figures = {}
    async with running(Service, folder, workspace.new_folder(), workers=1, model="image") as system:
        await load.run(_binary(system.port, "stamp", 8, requests=8))
        for process, pid in (("api", system.api.pid), ("worker", system.workers[0].pid)):
            figures[f"image_{process}_growth_payloads"] = await _growth(system, pid)
        for form in (_binary, _as_json):
            name = form.__name__.strip("_")
            before = usage(system.api.pid).cpu_seconds
            result = await load.run(form(system.port, "image", _SIDE, requests=_REQUESTS))
            api_seconds = usage(system.api.pid).cpu_seconds - before
            figures[f"image_{name}_per_second"] = result.per_second
            figures[f"image_{name}_api_cpu_ms"] = 1000 * api_seconds / _REQUESTS
    figures["image_as_json_api_cpu_to_binary"] = (
        figures["image_as_json_api_cpu_ms"] / figures["image_binary_api_cpu_ms"]
    )
    return figures


async def _growth(system: Service, pid: int) -> float:
    """The growth of a process's memory to its peak during one request, in sizes of the payload."""
    before_mib = reset_peak_mib(pid)
    await load.run(_binary(system.port, "image", _SIDE, requests=1))
    return (peak_mib(pid) - before_mib) * (1 << 20) / (4 * 3 * _SIDE**2)


def _place(folder: Path, name: str, side: int) -> None:
    """Writes a model that reads every pixel and does little else."""
    shape: list[str | int | None] = ["batch", 3, side, side]
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["x"], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (folder / name / "1").mkdir(parents=True)
    onnx.save(model, folder / name / "1" / "model.onnx")


def _pixels(side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).uniform(0, 1, (1, 3, side, side)).astype(np.float32)


def _as_json(port: int, model: str, side: int, *, requests: int) -> Plan:
    body = json.dumps({"data": _pixels(side).tolist()}).encode()
    return _plan(port, model, requests, body, _JSON)


def _binary(port: int, model: str, side: int, *, requests: int) -> Plan:
    pixels = _pixels(side)
    parameters = {"binary_data_size": pixels.nbytes}
    tensor = {"name": "x", "shape": pixels.shape, "datatype": "FP32", "parameters": parameters}
    head = json.dumps({"inputs": [tensor]}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    return _plan(port, model, requests, head + pixels.tobytes(), length)


def _plan(port: int, model: str, requests: int, body: bytes, header: str) -> Plan:
    connections = min(_CONNECTIONS, requests)
    return Plan(
        port=port, how="wait", requests=requests, connections=connections, body=body,
        path=f"/predict/{model}", headers=(header,),
    )  # fmt: skip
