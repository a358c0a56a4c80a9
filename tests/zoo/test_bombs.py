"""A model that kills or swells whoever loads it is tried out by somebody else."""

from pathlib import Path

import pytest

from asyncinfer.models.folder import scan
from asyncinfer.worker.models.sandbox import trial
from tests.zoo.hostile import BOMBS


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_refused_by_its_trial(tmp_path: Path, name: str) -> None:
    BOMBS[name](tmp_path, name)
    (file,) = scan(tmp_path)

    problem = await trial(file, file.path.stat().st_size, seconds=20)

    assert problem.startswith(f"{name}/1/model.onnx: ")
    assert ("ended with SIGABRT" in problem) == name.startswith("aborting")
