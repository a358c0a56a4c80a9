"""What the processes of a service log."""

import re
import socket
from pathlib import Path
from typing import Any, Final

import httpx2
import onnx
import pytest
import redis
from onnx import TensorProto, helper

from asyncinfer.api_keys import entry_of
from asyncinfer.client import Client, JobFailed
from tests.log_lines import of_logger, parsed

from .harness import eventually_sync
from .processes import DurableServer
from .services import open_services

SECRET: Final = "hunter2hunter2"
MARKER: Final = 48151623.42
WORD: Final = "payload-marker-of-a-test"


def failing_model(folder: Path) -> None:
    """A model that fails on every input but that of its example: it looks up a row by number."""
    node = helper.make_node("Gather", ["table", "index"], ["row"], axis=0)
    table = helper.make_tensor("table", TensorProto.FLOAT, [2, 1], [1.0, 2.0])
    graph = helper.make_graph(
        [node],
        "lookup",
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, ["n", 1])],
        [table],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, folder / "lookup.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    models.mkdir()
    failing_model(models)
    return models


def test_each_failed_job_has_a_line_with_its_request_and_no_line_has_a_payload_or_a_secret(
    durable: DurableServer, folder: Path, tmp_path: Path
) -> None:
    admin: Any = redis.Redis.from_url(durable.url)
    admin.execute_command("ACL", "SETUSER", "service", "on", f">{SECRET}", "~*", "&*", "+@all")
    admin.close()
    keys = tmp_path / "keys"
    keys.write_text(entry_of(SECRET, "acme", "submit,read,operator").line())
    environ = {
        "REDIS_URL": durable.url.replace("unix://", f"unix://service:{SECRET}@"),
        "MODEL_DIR": str(folder),
        "API_KEYS": str(keys),
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "DEBUG",
        "ACCESS_LOG": "true",
    }
    with open_services(tmp_path, **environ) as services:
        services.work()
        url = services.serve(api_key=SECRET)
        with Client(url, api_key=SECRET) as client:
            good = client.submit([0, 1], "lookup", request_id="req-good")
            assert good.wait().status == "completed"
            assert good.request_id == "req-good"
            lose_a_job(durable, "order-7")
            eventually_sync(lambda: "order-7" in services.log, "the lost job is logged")
            bad = [client.submit([int(MARKER)], "lookup", request_id=f"req-{n}") for n in range(30)]
            for job in bad:
                with pytest.raises(JobFailed):
                    job.result()
            headers = {"x-api-key": SECRET}
            refused = httpx2.post(f"{url}/predict/lookup", json={"data": [WORD]}, headers=headers)
            assert refused.status_code == 422
            assert httpx2.get(f"{url}/jobs?status={WORD}", headers=headers).status_code == 400
            for garbage in (
                f"{WORD}\r\n\r\n",
                f"GET / HTTP/1.1\r\nHost: {WORD}\r\nHost: {SECRET}\r\n\r\n",
                f"GET / HTTP/1.1\r\nAuthorization: Bearer {SECRET}\x01\r\n\r\n",
                f"POST /predict HTTP/1.1\r\nContent-Length: {WORD}\r\n\r\n",
            ):
                assert b" 400 " in sent(url, garbage)
            guess = {"x-api-key": f"a-guess-{WORD}"}
            assert httpx2.get(f"{url}/jobs", headers=guess).status_code == 401
            client.jobs(tenant="*")
        eventually_sync(
            lambda: "more jobs failed" in services.log or len(failures(services.log)) == 31,
            "the failed jobs are logged",
        )
        log = services.log
    for secret in (SECRET, str(int(MARKER)), WORD):
        assert secret not in log, [line for line in log.splitlines() if secret in line]

    told = failures(log)
    assert 10 <= len(told) <= 31
    lost = told.pop(0)
    assert (lost["job_id"], lost["code"], lost["model"]) == ("order-7", "input_lost", "lookup")
    assert "request_id" not in lost
    by_job = {job.id: f"req-{n}" for n, job in enumerate(bad)}
    for line in told:
        assert line["request_id"] == by_job[line["job_id"]]
        assert (line["model"], line["code"], line["role"]) == ("lookup", "model_failed", "worker")
        assert re.fullmatch(r"w-[0-9a-f]{6}", line["worker"])
        assert line["level"] == "WARNING"
    counted = [
        int(line["message"].split()[0])
        for line in of_logger(log, "asyncinfer.jobs")
        if "more jobs failed" in line["message"]
    ]
    assert len(told) + sum(counted) == len(bad)

    requests = of_logger(log, "asyncinfer.access")
    (submit,) = [line for line in requests if line["request_id"] == "req-good"]
    assert (submit["method"], submit["path"], submit["status"]) == ("POST", "/predict/lookup", 202)
    assert submit["client"] == "127.0.0.1"
    for line in parsed(log):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["role"] in ("api", "worker")
        assert isinstance(line["pid"], int)


def lose_a_job(server: DurableServer, job_id: str) -> None:
    """A job of another program, which has set no input."""
    program: Any = redis.Redis.from_url(server.url)
    program.set(f"job:{job_id}:status", "pending")
    program.lpush("predict_queue", job_id)
    program.close()


def sent(url: str, text: str) -> bytes:
    """The answer to these bytes, until the server closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def failures(log: str) -> list[dict[str, Any]]:
    return [line for line in of_logger(log, "asyncinfer.jobs") if "job_id" in line]
