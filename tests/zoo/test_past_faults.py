"""Faults that models have caused: unexpected load errors, killed starts, mixed-up jobs."""

import contextlib
from pathlib import Path
from typing import Any, Final

import httpx2
import numpy as np
import pytest

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import scan
from tests import zoo
from tests.faults.harness import eventually_sync
from tests.serving import running_serve
from tests.zoo.batch_run import run_jobs
from tests.zoo.catalogue import ENTRIES
from tests.zoo.control_flow import by_largest
from tests.zoo.hostile import aborting_split
from tests.zoo.mutations import BASES, mutate

UNEXPECTED: Final = (117, 205, 4061, 4636)
"""Seeds of damaged models that ONNX Runtime loads: huge dimensions, names that are not UTF-8."""


@pytest.mark.parametrize("seed", UNEXPECTED)
def test_a_model_with_impossible_shapes_or_names_is_loaded_or_refused(
    tmp_path: Path, seed: int
) -> None:
    base = BASES[seed % len(BASES)]
    content = mutate(ENTRIES[base].build().SerializeToString(), seed)
    zoo.place_bytes(tmp_path, "m", content)
    (file,) = scan(tmp_path)

    with contextlib.suppress(ModelRefused):
        assert Engine.load(file, intra_op_threads=1).signature.inputs


@pytest.mark.parametrize(
    ("threshold", "toml"), [(0.5, ""), (5, ""), (50, ""), (1000, "example = [[2000.0, 0.0]]")]
)
def test_a_large_number_of_one_job_changes_no_other_jobs_result(
    tmp_path: Path, threshold: float, toml: str
) -> None:
    """Probe jobs with small numbers all lie on one side of the threshold, and show nothing.

    Numbers as large as the example are probed too; larger ones are not, since they might cost any
    amount of time and memory.
    """
    zoo.place(tmp_path, "m", by_largest(threshold), toml=toml)
    (file,) = scan(tmp_path)
    jobs = [{"x": np.full((1, 2), value, np.float32)} for value in (0.25, 2 * threshold)]

    small, large = run_jobs(Engine.load(file, intra_op_threads=1), jobs)

    assert small.outputs is not None
    assert large.outputs is not None
    assert small.outputs["y"].tolist() == [[-0.25, -0.25]]
    assert large.outputs["y"].tolist() == [[4 * threshold, 4 * threshold]]


@pytest.mark.soak
def test_serve_starts_beside_a_model_that_kills_the_process_that_loads_it(tmp_path: Path) -> None:
    """Else a model that its trial refused while the worker ran would end every later start."""
    zoo.place(tmp_path / "models", "good", zoo.mlp([2, 2]))
    zoo.place(tmp_path / "models", "kills", aborting_split())
    environ = {"MODEL_DIR": str(tmp_path / "models"), "DATA_DIR": str(tmp_path / "data")}
    environ |= {"TMPDIR": str(tmp_path), "DEFAULT_MODEL": "good"}

    with running_serve(cwd=tmp_path, **environ) as serve:
        url = serve.banner["URL"]
        with httpx2.Client(timeout=30, verify=False) as client:

            def good_is_served() -> bool:
                body = {"data": [[1.0, 2.0]]}
                reply = client.post(f"{url}/predict", json=body, headers={"Prefer": "wait=20"})
                return reply.status_code == 200 and reply.json()["status"] == "completed"

            def other_is_refused() -> bool:
                problems.append(client.get(f"{url}/models/kills").json())
                return bool(problems[-1]["code"] == "model_not_found")

            problems: list[dict[str, Any]] = []
            eventually_sync(good_is_served, "the good model is served")
            # The good model is served while the other is still being tried.
            eventually_sync(other_is_refused, "the other model is refused", 60)

    assert {problem["code"] for problem in problems} <= {"model_loading", "model_not_found"}
    assert "SIGABRT" in problems[-1]["detail"]
