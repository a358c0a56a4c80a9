"""Wrong keys, full queues and restarts: one line of error, and no row lost."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncinfer import api_keys
from asyncinfer.testing import Running, service
from tests.cli.command_line import CommandResult, error_line, run_command
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.serving import running_serve, wait_for_result

ROW = "5.1,3.5,1.4,0.2\n"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A service with API keys and a small queue, and a key that may only read."""
    reader = api_keys.new_key()
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(api_keys.entry_of(reader, "default", "read").line() + "\n")
    with service(api_keys=keys, max_queue=3) as running:
        yield running, reader


@pytest.fixture
def reader(guarded: tuple[Running, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The key that may only read; it is not in the environment."""
    monkeypatch.setenv("ASYNCINFER_URL", guarded[0].url)
    return guarded[1]


@pytest.fixture
def full_access(guarded: tuple[Running, str], reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a key with every scope into the environment."""
    assert guarded[0].api_key
    monkeypatch.setenv("ASYNCINFER_API_KEY", guarded[0].api_key)


@pytest.mark.parametrize(
    "argv",
    [
        ("jobs",),
        ("models",),
        ("top",),
        ("predict", "1", "2", "3", "4"),
        ("bench",),
        ("cancel", "x"),
    ],
    ids=lambda argv: str(argv[0]),
)
def test_without_a_key_or_with_a_wrong_one_nobody_is_let_in(
    argv: tuple[str, ...], reader: str
) -> None:
    for more in ((), ("--api-key", "ai_wrong")):
        message = error_line(run_command(*argv, *more), 3)
        assert "ASYNCINFER_API_KEY" in message


def test_a_key_without_the_scope_is_refused(reader: str) -> None:
    key = ("--api-key", reader)

    assert run_command("jobs", *key).code == 0
    assert "operator" in error_line(run_command("audit", *key), 3)
    assert "admin" in error_line(run_command("pause", "iris", *key), 3)
    assert "submit" in error_line(run_command("cancel", "x", *key), 3)


@pytest.mark.soak
def test_the_doctor_says_that_a_key_is_needed(reader: str) -> None:
    ran = run_command("doctor")

    assert "warning  API key" in ran.out or "problem  API" in ran.out
    assert "ASYNCINFER_API_KEY" in ran.out


@pytest.mark.soak
def test_a_full_queue_is_waited_for_and_no_row_is_lost(full_access: None, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROW * 40)
    argv = ("-m", "asyncinfer", "predict", "rows.csv", "--batch", "1", "--in-flight", "16")
    run_command("pause", "iris")
    with subprocess.Popen(
        [sys.executable, *argv], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        eventually_sync(lambda: len(run_command("jobs", "--json").json) >= 3, "the queue is full")
        run_command("resume", "iris")
        out, err = process.communicate(timeout=30)
    ran = CommandResult(process.returncode, out.decode(), err.decode())

    assert ran.code == 0, ran.err
    assert [row["row"] for row in ran.rows] == list(range(1, 41))


@pytest.mark.soak
@pytest.mark.system("curl")
def test_a_server_that_restarts_in_the_middle_loses_no_row(tmp_path: Path) -> None:
    port, data_dir = str(free_port()), str(tmp_path / "data")
    (tmp_path / "rows.csv").write_text(ROW * 100_000)
    argv = ("-m", "asyncinfer", "predict", "rows.csv", "--url", f"http://127.0.0.1:{port}")
    with running_serve("--port", port, DATA_DIR=data_dir) as serve:
        wait_for_result(serve)
        process = subprocess.Popen(
            [sys.executable, *argv, "-o", "answers.ndjson"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        part = tmp_path / "answers.ndjson.part"
        eventually_sync(lambda: part.exists() and part.stat().st_size > 100_000, "it is under way")
        serve.process.kill()
    with process, running_serve("--port", port, DATA_DIR=data_dir):
        assert process.wait(90) == 0, process.stderr and process.stderr.read()
    lines = (tmp_path / "answers.ndjson").read_text().splitlines()
    assert len(lines) == 100_000
    assert not any('"error"' in line for line in lines)


@pytest.mark.parametrize("argv", [("job",), ("models",), ("retry",), ("jobs", "--model")])
def test_a_name_that_is_not_utf8_is_refused(url: str, argv: tuple[str, ...]) -> None:
    assert "not valid UTF-8" in error_line(run_command(*argv, "\udcff"), 2)
