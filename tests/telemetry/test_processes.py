"""`serve` and `work` with TRACES on and off: what they load, export, and do without a collector."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from asyncinfer.client import Client
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY
from tests.serving import EXIT_REFUSED, running_serve

from .collector import running_collector

ROW = [[5.1, 3.5, 1.4, 0.2]]


@pytest.fixture
def without_opentelemetry(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that does not have it: a package that cannot be imported lies
    in front of the one that is installed."""
    package = tmp_path / "path" / "opentelemetry"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ModuleNotFoundError('not installed')")
    return {"PYTHONPATH": os.pathsep.join((str(package.parent), str(REPOSITORY)))}


_LISTS_ITS_MODULES_AT_EXIT: Final = """
import atexit, os, pathlib, sys
folder = pathlib.Path(__file__).parent
atexit.register(lambda: (folder / f"{os.getpid()}.modules").write_text("\\n".join(sys.modules)))
"""


def test_without_traces_serve_and_work_load_nothing_of_it_and_need_nothing(
    tmp_path: Path, without_opentelemetry: dict[str, str]
) -> None:
    folder = tmp_path / "path"
    (folder / "sitecustomize.py").write_text(_LISTS_ITS_MODULES_AT_EXIT)
    environ = {**without_opentelemetry, "DATA_DIR": str(tmp_path / "data"), "MODELS": "iris"}
    with running_serve(cwd=REPOSITORY, **environ) as serve:
        with Client(serve.banner["URL"]) as client:
            client.predict(ROW)
        serve.process.process.send_signal(signal.SIGTERM)
        assert serve.process.process.wait(30) == 0
    processes = [set(file.read_text().split("\n")) for file in folder.glob("*.modules")]

    assert any("asyncinfer.api.server" in modules for modules in processes)
    assert any("asyncinfer.worker.worker" in modules for modules in processes)
    for modules in processes:
        # Only `tracing` imports OpenTelemetry. redis-py loads its metrics where it is installed.
        assert "asyncinfer.telemetry.tracing" not in modules
        assert not [name for name in modules if name.startswith("opentelemetry")]


def test_the_client_loads_no_tracing() -> None:
    code = (
        "import sys, asyncinfer.client as c, asyncinfer.telemetry.trace_context as t;"
        "assert t.headers_of_caller() == {};"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["serve", "work"])
def test_traces_without_opentelemetry_are_refused_in_one_line(
    command: str, tmp_path: Path, without_opentelemetry: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asyncinfer", command],
        env={
            **os.environ,
            **without_opentelemetry,
            "DATA_DIR": str(tmp_path / "d"),
            "TRACES": "on",
        },
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
    )
    assert done.returncode == EXIT_REFUSED
    assert done.stderr.count("\n") == 1
    assert "pip install 'asyncinfer[otel]'" in done.stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.soak
def test_every_process_exports_its_last_spans_as_it_stops(tmp_path: Path) -> None:
    with running_collector() as (collector, url):
        environ = {
            "DATA_DIR": str(tmp_path),
            "MODELS": "iris",
            "TRACES": "on",
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            # Spans leave in pairs, so that some are left at the end.
            "OTEL_BSP_SCHEDULE_DELAY": "60000",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "2",
        }
        with running_serve("--api-processes", "2", cwd=REPOSITORY, **environ) as serve:
            jobs = 0

            def both_have_answered() -> bool:
                nonlocal jobs
                jobs += 1
                # The kernel gives a new connection to either process.
                with Client(serve.banner["URL"]) as client:
                    client.predict(ROW)
                return list(collector.services.values()).count("asyncinfer-api") == 2

            eventually_sync(both_have_answered, "both API processes export spans")
            if jobs % 2 == 0:
                both_have_answered()
            serve.process.process.send_signal(signal.SIGTERM)
            assert serve.process.process.wait(30) == 0

    assert [collector.count(word) for word in ("queued", "run", "finish")] == [jobs] * 3
    # A client tries again while an API does not know the model yet.
    assert collector.count("POST") >= jobs
    assert sorted(collector.services.values()) == [
        "asyncinfer-api",
        "asyncinfer-api",
        "asyncinfer-worker",
    ]


@pytest.mark.soak
def test_a_silent_collector_delays_no_job_and_no_stop(tmp_path: Path) -> None:
    with running_collector(silent=True) as (collector, url):
        environ = {
            "DATA_DIR": str(tmp_path),
            "MODELS": "iris",
            "TRACES": "on",
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_BSP_MAX_QUEUE_SIZE": "64",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8",
        }
        with (
            running_serve(cwd=REPOSITORY, **environ) as serve,
            Client(serve.banner["URL"]) as client,
        ):
            client.predict(ROW)
            eventually_sync(lambda: collector.requests >= 2, "both wait for the collector")
            # Many more spans than the queues of both processes hold.
            began = time.monotonic()
            results = list(client.map(ROW * 100, batch=1, progress=False))
            assert len(results) == 100
            assert time.monotonic() - began < 9, "an export that is not answered takes 10 s"
            began = time.monotonic()
            serve.process.process.send_signal(signal.SIGTERM)
            assert serve.process.process.wait(30) == 0
            # 2 s of each process for its spans, one after the other.
            assert time.monotonic() - began < 9
            log = serve.process.read_stderr()
    assert "Traceback" not in log
    assert "The last spans could not be exported within 2 s." in log
