"""The state of a service under test, read over HTTP."""

import http.client
import json
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

_SECONDS: Final = 10.0


class Unfinished(Struct, frozen=True):
    """Counts of a model's jobs that have not ended; false if there are none."""

    waiting: int = 0
    """Jobs that wait, delayed ones included."""
    running: int = 0
    paused: bool = False

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def __str__(self) -> str:
        paused = ", and it is paused" if self.paused else ""
        return f"{self.waiting} waiting, {self.running} running{paused}"


class StatusClient:
    """Reads what a service serves, and which jobs have not ended. Each call is a new request
    with a timeout of 10 s; it raises OSError if there is no connection or no status 200."""

    def __init__(self, port: int, api_key: str | None) -> None:
        self._port = port
        self._headers = {"x-api-key": api_key} if api_key else {}

    def announced(self) -> tuple[set[str], dict[str, str]]:
        """The names of the models that are served, and the reasons by name why others are not."""
        listed = self._get("/models")
        reasons = {problem["model"]: problem["reason"] for problem in listed["problems"]}
        return {model["model"] for model in listed["models"]}, reasons

    def unfinished(self) -> dict[str, Unfinished]:
        """Counts of jobs that wait or run, by model; models without such jobs are left out."""
        queues = self._get("/queues")["queues"]
        by_model = {queue["model"]: _count(queue) for queue in queues if queue["model"] is not None}
        return {model: counts for model, counts in sorted(by_model.items()) if counts}

    def _get(self, path: str) -> Mapping[str, Any]:
        """The JSON object at a path of the API, read directly, without the proxies that the
        environment may name."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SECONDS)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise OSError(f"GET {path}: {response.status} {body.decode(errors='replace')}")
        answer: Mapping[str, Any] = json.loads(body)
        return answer


def _count(queue: Mapping[str, Any]) -> Unfinished:
    """The counts of one queue as `GET /queues` lists it."""
    waiting = sum(queue["waiting"].values()) + queue["delayed"]
    return Unfinished(waiting, queue["running"], queue["paused"])
