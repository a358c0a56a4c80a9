"""Jobs that tests of commands submit to a service, and wait for."""

import json
import urllib.request
from typing import Any

from tests.faults.harness import eventually_sync

IRIS = [[5.1, 3.5, 1.4, 0.2]]


def submit(url: str, model: str = "iris", data: Any = None) -> str:
    """Submits a job and returns its id."""
    body = json.dumps({"data": data or (IRIS if model == "iris" else [[0.0] * 64])}).encode()
    request = urllib.request.Request(
        f"{url}/predict/{model}", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        job_id: str = json.load(answer)["job_id"]
    return job_id


def wait_until_ended(url: str, job_id: str) -> str:
    """Waits until a job has ended, and returns its id."""

    def has_ended() -> bool:
        with urllib.request.urlopen(f"{url}/job/{job_id}?wait=5", timeout=10) as answer:
            return json.load(answer)["status"] not in ("pending", "processing")

    eventually_sync(has_ended, "the job has ended")
    return job_id
