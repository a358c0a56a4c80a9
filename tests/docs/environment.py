"""The environment in which the commands of documents run."""

import os
import sys
from pathlib import Path

import pytest

from asyncinfer.settings import Settings


def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts `asyncinfer` on the PATH, and removes all settings."""
    for name in Settings.__struct_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
