"""The most memory that a process had, and that compose.yaml gives it."""

from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.process import REPOSITORY

needs_proc: Final = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

_UNITS: Final = {"M": 1 << 20, "G": 1 << 30}


def peak_bytes(pid: int) -> int:
    """The highest resident memory of the process so far (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def compose_bytes(service: str) -> int:
    """The memory of this service in compose.yaml."""
    memory: str = compose_service(service)["deploy"]["resources"]["limits"]["memory"]
    return int(memory[:-1]) * _UNITS[memory[-1]]


def compose_service(service: str) -> Any:
    """What compose.yaml says of this service."""
    return yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"][service]
