"""The lines of a log with LOG_FORMAT=json."""

import json
from typing import Any


def parsed(log: str) -> list[dict[str, Any]]:
    """The objects of the log's lines; other lines are those of a banner, which stay out."""
    lines = [line for line in log.splitlines() if line.startswith("{")]
    objects: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return objects


def of_logger(log: str, name: str) -> list[dict[str, Any]]:
    return [line for line in parsed(log) if line["logger"] == name]
