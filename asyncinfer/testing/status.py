"""What is asked of a service under test over HTTP."""

import http.client
import json
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

_SECONDS: Final = 10.0


class Left(Struct, frozen=True):
    """What a model has still to do."""

    waiting: int = 0
    """Delayed ones included."""
    running: int = 0
    paused: bool = False

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def __str__(self) -> str:
        paused = ", and it is paused" if self.paused else ""
        return f"{self.waiting} waiting, {self.running} running{paused}"


class Questions:
    def __init__(self, port: int, api_key: str | None) -> None:
        self._port = port
        self._headers = {"x-api-key": api_key} if api_key else {}

    def announced(self) -> tuple[set[str], dict[str, str]]:
        """The models that are served, and of those that are not why."""
        told = self._get("/models")
        reasons = {one["model"]: one["reason"] for one in told["problems"]}
        return {one["model"] for one in told["models"]}, reasons

    def left(self) -> dict[str, Left]:
        """By model what waits or runs; models that are done are not in it."""
        queues = self._get("/queues")["queues"]
        found = {one["model"]: _left(one) for one in queues if one["model"] is not None}
        return {model: left for model, left in sorted(found.items()) if left}

    def _get(self, path: str) -> Mapping[str, Any]:
        """Without the proxies that the environment may name."""
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


def _left(queue: Mapping[str, Any]) -> Left:
    waiting = sum(queue["waiting"].values()) + queue["delayed"]
    return Left(waiting, queue["running"], queue["paused"])
