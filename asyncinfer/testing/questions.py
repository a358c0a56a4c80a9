"""What is asked of a service under test over HTTP."""

import http.client
import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from msgspec import Struct

_SECONDS: Final = 10.0
_PAGE: Final = 1000


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
        served, _ = self.announced()
        found = {model: self._left(model) for model in sorted(served)}
        return {model: left for model, left in found.items() if left}

    def _left(self, model: str) -> Left:
        # A delayed job is in no list that is counted, and is looked for only at the end: a listing
        # costs the more the more jobs there were. It may have become due in between.
        return self._counted(model) or Left(self._pending(model)) or self._counted(model)

    def _counted(self, model: str) -> Left:
        scale = self._get(f"/scale/{quote(model)}")
        return Left(scale["waiting_jobs"], scale["running_jobs"], scale["paused"])

    def _pending(self, model: str) -> int:
        count, cursor = 0, ""
        while cursor is not None:
            path = f"/jobs?status=pending&model={quote(model)}&limit={_PAGE}"
            page = self._get(path + (f"&cursor={cursor}" if cursor else ""))
            count, cursor = count + len(page["jobs"]), page["cursor"]
        return count

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
