"""Fixtures for pytest: one service for the session, of the models that a conftest.py names.

pytest loads them if the conftest.py at the top of your tests says so:

    import pytest

    pytest_plugins = ["asyncinfer.testing.plugin"]


    @pytest.fixture(scope="session")
    def asyncinfer_models():
        return {"churn": "models/churn.onnx"}


    @pytest.fixture(scope="session")
    def asyncinfer_settings():
        return {"max_queue": 10}

Both are optional; without the first the shipped models are served. A test then requests
`asyncinfer_service`, an `asyncinfer.testing.Running`:

    def test_everyone_is_scored(asyncinfer_service):
        submit_everyone(asyncinfer_service.url)
        asyncinfer_service.drain()
        assert not unscored()

It starts when the first test requests it, and each process of pytest-xdist has its own. A failed
test's report shows the last lines of the service's log.
"""

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Final

import pytest

from asyncinfer.testing.running_service import Running
from asyncinfer.testing.service import service
from asyncinfer.testing.settings import Model

_LINES_SHOWN: Final = 50


@pytest.fixture(scope="session")
def asyncinfer_models() -> Model | Mapping[str, Model] | None:
    """The models to serve: by name, or the first argument of `service`. Override it; None serves
    the shipped models."""
    return None


@pytest.fixture(scope="session")
def asyncinfer_settings() -> Mapping[str, Any]:
    """Settings of `asyncinfer serve` and keyword arguments of `service`, by name. Override it."""
    return {}


@pytest.fixture(scope="session")
def asyncinfer_service(
    asyncinfer_models: Model | Mapping[str, Model] | None, asyncinfer_settings: Mapping[str, Any]
) -> Iterator[Running]:
    """A running service for all tests of this process, which ends with the session."""
    if isinstance(asyncinfer_models, Mapping):
        started = service(models=asyncinfer_models, **asyncinfer_settings)
    else:
        started = service(asyncinfer_models, **asyncinfer_settings)
    with started as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of the service's log to the report of a failed test that uses it."""
    report = yield
    running = getattr(item, "funcargs", {}).get("asyncinfer_service")
    if report.failed and isinstance(running, Running):
        last_lines = running.log.splitlines()[-_LINES_SHOWN:]
        report.sections.append((f"last lines of {running!r}", "\n".join(last_lines)))
    return report
