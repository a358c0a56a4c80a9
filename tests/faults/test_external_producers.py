"""External producers and readers: programs that know only the job keys, as processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from asyncinfer.repository import keys

from .harness import assert_at_rest, eventually
from .processes import OpenWorkers

_PRODUCER = """
import json, sys, redis
client = redis.Redis.from_url(sys.argv[1])
for number, row in enumerate(json.loads(sys.argv[2])):
    job_id = f"external-{number}"
    client.set(f"job:{job_id}:data", json.dumps({"data": [row]} if number % 2 else [row]))
    client.set(f"job:{job_id}:status", "pending")
    client.lpush("predict_queue", job_id)
"""

_READER = """
import json, sys, time, redis
client = redis.Redis.from_url(sys.argv[1], decode_responses=True)
deadline = time.monotonic() + 20
results = {}
for job_id in sys.argv[2:]:
    while client.get(f"job:{job_id}:status") not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    results[job_id] = json.loads(client.get(f"job:{job_id}:result"))
print(json.dumps(results))
"""


def _run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


async def test_a_ten_line_script_gets_its_job_run_and_reads_the_result(
    open_workers: OpenWorkers, redis_url: str, server: redis.Redis, shipped_models: Path
) -> None:
    with open_workers(model_dir=str(shipped_models), models=()) as workers:
        workers.start()
        _run(_PRODUCER, redis_url, json.dumps([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]))
        results = json.loads(_run(_READER, redis_url, "external-0", "external-1"))
        assert results["external-0"]["class_name"] == "setosa"
        assert results["external-1"]["class_name"] == "virginica"
        await workers.members[0].stop()
    assert_at_rest(server, "predict_queue")


@pytest.mark.soak
async def test_150_external_jobs_are_run_once_a_worker_starts(
    open_workers: OpenWorkers, redis_url: str, server: redis.Redis, shipped_models: Path
) -> None:
    _run(_PRODUCER, redis_url, json.dumps([[5.1, 3.5, 1.4, 0.2]] * 150))
    assert server.llen("predict_queue") == 150
    with open_workers(model_dir=str(shipped_models), models=()) as workers:
        workers.start()
        names = [keys.status(f"external-{number}") for number in range(150)]
        await eventually(lambda: server.mget(names) == [b"completed"] * 150, "150 completed")
        await workers.members[0].stop()
    assert_at_rest(server, "predict_queue")


@pytest.mark.soak
async def test_wrong_data_of_an_external_producer_fails_that_job_alone(
    open_workers: OpenWorkers, redis_url: str, server: redis.Redis, shipped_models: Path
) -> None:
    bad = {"a": "not json", "b": "[[1, 2]]", "c": '{"rows": []}', "d": "[[NaN,1,1,1]]", "e": "7"}
    for job_id, data in bad.items():
        server.set(keys.data(job_id), data)
        server.set(keys.status(job_id), "pending")
    server.set(keys.data("good"), "[[5.1, 3.5, 1.4, 0.2]]")
    server.set(keys.status("good"), "pending")
    server.lpush("predict_queue", *bad, "good", "never-stored")
    with open_workers(model_dir=str(shipped_models), models=()) as workers:
        workers.start()
        assert json.loads(_run(_READER, redis_url, "good"))["good"]["class_name"] == "setosa"
        await workers.members[0].stop()
    for job_id in bad:
        assert server.get(keys.status(job_id)) == b"failed"
        error = json.loads(server.get(keys.error(job_id)) or b"{}")
        assert error["code"] == "invalid_input"
        assert error["message"]
    assert_at_rest(server, "predict_queue")
