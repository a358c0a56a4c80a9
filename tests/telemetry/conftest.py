"""Fixtures: models, and where an API and a worker of a test find what they need."""

import shutil
from pathlib import Path

import pytest
import redis

from asyncinfer.repository.policy import Policy
from tests import zoo
from tests.tracebacks import no_traceback as no_traceback

from .harness import Deployment, Spans


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, shipped_models: Path) -> Path:
    """A folder with `iris` and `picky`, which fails for values over 2."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shipped_models / "iris", folder / "iris")
    zoo.place(folder, "picky", zoo.picky())
    return folder


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def deployment(redis_url: str, policy: Policy, model_dir: Path, server: redis.Redis) -> Deployment:
    return Deployment(redis_url, policy, model_dir, server)
