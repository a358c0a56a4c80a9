"""A fixture of the tests of documents."""

from pathlib import Path

import pytest

from .environment import clear_environment


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the commands of a document, with `asyncinfer` on the PATH and no settings."""
    clear_environment(monkeypatch)
    return tmp_path
