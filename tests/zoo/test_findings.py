"""What a model may not do: fail a load unexpectedly, kill a start, mix one job with another."""

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
from tests.serving import serving
from tests.zoo.catalogue import ENTRIES
from tests.zoo.flowing import by_largest
from tests.zoo.hostile import aborting_split
from tests.zoo.mutating import BASES, mutated
from tests.zoo.running import serve

UNEXPECTED: Final = (117, 205, 4061, 4636)
"""Seeds of damaged models that ONNX Runtime loads: huge fixed dimensions, names not UTF-8."""


@pytest.mark.parametrize("seed", UNEXPECTED)
def test_a_model_of_impossible_shapes_or_names_is_refused_or_loaded(
    tmp_path: Path, seed: int
) -> None:
    base = BASES[seed % len(BASES)]
    content = mutated(ENTRIES[base].build().SerializeToString(), seed)
    zoo.place_bytes(tmp_path, "m", content)
    (file,) = scan(tmp_path)

    with contextlib.suppress(ModelRefused):
        assert Engine.load(file, intra_op_threads=1).signature.inputs


@pytest.mark.parametrize(
    ("threshold", "toml"), [(0.5, ""), (5, ""), (50, ""), (1000, "example = [[2000.0, 0.0]]")]
)
def test_one_jobs_large_number_changes_no_other_jobs_answer(
    tmp_path: Path, threshold: float, toml: str
) -> None:
    """Probe jobs of like size all lie on one side of the threshold, and prove nothing. Numbers as
    large as the example are tried too; larger ones are not, which may cost any time and memory."""
    zoo.place(tmp_path, "m", by_largest(threshold), toml=toml)
    (file,) = scan(tmp_path)
    jobs = [{"x": np.full((1, 2), value, np.float32)} for value in (0.25, 2 * threshold)]

    small, large = serve(Engine.load(file, intra_op_threads=1), jobs)

    assert small.answers is not None
    assert large.answers is not None
    assert small.answers["y"].tolist() == [[-0.25, -0.25]]
    assert large.answers["y"].tolist() == [[4 * threshold, 4 * threshold]]


@pytest.mark.soak
def test_serve_comes_up_beside_a_model_that_kills_who_loads_it(tmp_path: Path) -> None:
    """Else one that its trial refused while the worker ran takes every later start down."""
    zoo.place(tmp_path / "models", "good", zoo.mlp([2, 2]))
    zoo.place(tmp_path / "models", "kills", aborting_split())
    environ = {"MODEL_DIR": str(tmp_path / "models"), "DATA_DIR": str(tmp_path / "data")}
    environ |= {"TMPDIR": str(tmp_path), "DEFAULT_MODEL": "good"}

    with serving(cwd=tmp_path, **environ) as serve:
        url = serve.welcome["URL"]
        with httpx2.Client(timeout=30, verify=False) as client:

            def answered() -> bool:
                body = {"data": [[1.0, 2.0]]}
                sent = client.post(f"{url}/predict", json=body, headers={"Prefer": "wait=20"})
                return sent.status_code == 200 and sent.json()["status"] == "completed"

            def is_refused() -> bool:
                told.append(client.get(f"{url}/models/kills").json())
                return bool(told[-1]["code"] == "model_not_found")

            told: list[dict[str, Any]] = []
            eventually_sync(answered, "the good model answers")
            # It answers while the other one is still being tried.
            eventually_sync(is_refused, "the other one is refused", 60)

    assert {one["code"] for one in told} <= {"model_loading", "model_not_found"}
    assert "SIGABRT" in told[-1]["detail"]
