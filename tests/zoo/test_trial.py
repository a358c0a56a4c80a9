"""A model that kills the process that loads it, or fills its memory, is tried in a child first."""

from pathlib import Path

import pytest

from asyncinfer.models.folder import scan
from asyncinfer.worker.models.sandbox import try_in_child
from tests.sampling import soak_except
from tests.zoo.hostile import BOMBS


@pytest.mark.parametrize("name", soak_except(BOMBS, 2))
async def test_a_model_that_kills_the_process_that_loads_it_is_refused_by_its_trial(
    tmp_path: Path, name: str
) -> None:
    BOMBS[name](tmp_path, name)
    (file,) = scan(tmp_path)

    problem = await try_in_child(file, file.path.stat().st_size, seconds=20)

    assert problem.startswith(f"{name}/1/model.onnx: ")
    assert ("ended with SIGABRT" in problem) == name.startswith("aborting")
