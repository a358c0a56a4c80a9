"""The commands `serve`, `work` and `keygen`: they start, or refuse and say what to do."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from asyncinfer import __version__, settings
from asyncinfer.api_keys import Caller, Keyring, digest_of
from asyncinfer.cli import main
from tests import zoo
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY, is_gone, python_process
from tests.serving import EXIT_REFUSED, ServeProcess, running_serve, wait_for_result


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for knob in settings.knobs():
        monkeypatch.delenv(knob.variable, raising=False)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must be refused; returns its one line on stderr."""
    assert main(argv) == EXIT_REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asyncinfer: ")
    assert err.count("\n") == 1
    return err


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 0
    return capsys.readouterr().out


def test_the_version_flag_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(capsys, "--version") == f"asyncinfer {__version__}\n"


@pytest.mark.parametrize("command", ["serve", "work"])
def test_help_shows_every_setting_with_its_flag_variable_and_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    shown = " ".join(help_of(capsys, command, "--help").split())

    for knob in settings.knobs():
        assert f" {knob.flag}" in shown
        default = knob.unset if knob.default in (None, ()) else _unit(knob)
        assert f"{default}. [{knob.variable}]" in shown


def _unit(knob: settings.Knob) -> str:
    """The unit of its default."""
    singular = {"processes": "process", "seconds": "second"}
    return singular.get(knob.unit, knob.unit) if knob.default == 1 else knob.unit


def test_a_wrong_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--port is '70000'" in refusal(capsys, "serve", "--port", "70000")


@pytest.mark.parametrize("command", ["serve", "work", "doctor", "top"])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h:6379/mydb", "a database that is no number"),
        ("redis://:s3cret@ss/w#rd@h", "percent-encode"),
        (
            "redis://:s3cret@h?decode_responses=true",
            "the option decode_responses, which",
        ),
        ("rediss://:s3cret@h?ssl_ca_cert=x", "Did you mean ssl_ca_certs?"),
        ("rediss://:s3cret@h?ssl_ca_certs=/absent.pem", "/absent.pem cannot be read"),
    ],
)
def test_a_redis_url_that_cannot_be_meant_is_refused_alike_by_every_command(
    command: str, url: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = "--redis" if command == "top" else "--redis-url"
    message = refusal(capsys, command, flag, url)

    assert message.startswith("asyncinfer: REDIS_URL")
    assert words in message
    assert not any(part in message for part in ("s3cret", "ss/w", "w#rd"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_a_public_address_without_keys_is_refused(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "serve", "--host", host)

    assert all(word in message for word in ("keygen", "API_KEYS", "--insecure"))


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_metrics_port_in_use_is_refused(
    processes: str, capsys: pytest.CaptureFixture[str], redis_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        where = ("--redis-url", redis_url, "--port", str(free_port()), "--metrics-port", port)
        message = refusal(capsys, "serve", *where, "--api-processes", processes)
    assert f"Cannot listen on 127.0.0.1:{port}" in message
    assert "METRICS_PORT" in message


def test_work_without_a_redis_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "work")

    assert all(word in message for word in ("REDIS_URL", "asyncinfer serve", "DATA_DIR"))


_AS_A_NATIVE_MODULE: Final = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass
except BaseException as error:
    raise ImportError("initialization failed") from error
"""
"""ONNX Runtime's own import turns every exception during it into an ImportError."""


def test_a_worker_that_is_stopped_while_it_imports_exits_without_output(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(_AS_A_NATIVE_MODULE)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    environ = {**os.environ, "PYTHONPATH": path, "REDIS_URL": "redis://127.0.0.1:1"}

    done = subprocess.run(
        [sys.executable, "-m", "asyncinfer", "work"],
        env=environ,
        capture_output=True,
        check=False,
        timeout=30,
    )

    assert (done.returncode, done.stderr) == (0, b"")


def test_a_model_folder_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = ("--redis-url", "redis://127.0.0.1:1")

    assert f"MODEL_DIR {tmp_path}/no" in refusal(
        capsys, "work", *url, "--model-dir", f"{tmp_path}/no"
    )


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("no.onnx", (), "is no .onnx file"),
        ("churn.txt", (), "is no .onnx file"),
        ("-churn.onnx", (), "MODEL: rename -churn.onnx"),
        ("churn.onnx", ("--default-model", "iris"), "Set one of the two"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "work"])
def test_a_model_file_that_cannot_be_served_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    name: str,
    flags: tuple[str, ...],
    message: str,
) -> None:
    if name != "no.onnx":
        (tmp_path / name).write_bytes(b"")
    url = ("--redis-url", "redis://127.0.0.1:1")
    assert message in refusal(capsys, command, *url, "--model", str(tmp_path / name), *flags)


def test_a_default_model_that_the_folder_does_not_have_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    zoo.place(tmp_path, "wine", zoo.mlp([3, 2]))
    zoo.place(tmp_path, "churn", zoo.mlp([3, 2]))
    message = refusal(capsys, "serve", "--model-dir", str(tmp_path), "--default-model", "nope")

    assert all(word in message for word in ("'nope'", str(tmp_path), "churn, wine"))


@pytest.mark.parametrize("command", ["serve", "work"])
def test_a_start_with_models_that_do_not_exist_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    zoo.place(tmp_path, "iris", zoo.adds(1))
    flags = ("--redis-url", "redis://127.0.0.1:1", "--model-dir", str(tmp_path))
    work = ("--work",) if command == "serve" else ()

    message = refusal(capsys, command, *work, *flags, "--models", "nope,none")

    assert f"MODELS names none, nope, and {tmp_path} has no such model" in message


# --- keygen ----------------------------------------------------------------------------------


def test_a_new_key_is_accepted_with_its_line_in_the_key_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(("keygen", "--tenant", "acme", "--scopes", "submit,read")) == 0
    line, shown = capsys.readouterr()
    key = next(word for word in shown.split() if word.startswith("ai_"))
    (tmp_path / "keys").write_text(line)

    caller = Keyring.load(tmp_path / "keys").caller_of(digest_of(key))

    assert caller is not None
    assert caller == Caller("acme", frozenset({"submit", "read"}))
    assert key not in line


def test_a_key_of_an_unknown_scope_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "submit, read, admin" in refusal(capsys, "keygen", "--scopes", "write")


# --- serve with Valkey and worker ------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A `serve` without settings, in a folder of its own, shared by tests that change nothing."""
    folder = tmp_path_factory.mktemp("anywhere")
    environ = {"DATA_DIR": str(folder / "data"), "PYTHONPATH": str(REPOSITORY)}
    with pytest.MonkeyPatch.context() as patch:
        for knob in settings.knobs():
            patch.delenv(knob.variable, raising=False)
        with running_serve(cwd=folder, **environ) as serve:
            yield serve


@pytest.mark.system("curl")
def test_one_command_starts_it_and_the_curl_line_of_its_banner_gets_a_result(
    served: ServeProcess,
) -> None:
    assert wait_for_result(served)["result"]["class_name"] == "setosa"
    assert served.banner["Redis"].startswith("Valkey ")


def test_it_works_from_any_folder_with_the_shipped_models(served: ServeProcess) -> None:
    assert "iris (default)" in served.banner["Models"]


@pytest.mark.soak
def test_a_single_model_file_is_served_as_the_default_model(tmp_path: Path) -> None:
    file = tmp_path / "churn.onnx"
    file.write_bytes(zoo.mlp([3, 2]).SerializeToString())
    with running_serve("--model", str(file), DATA_DIR=str(tmp_path / "data")) as serve:
        assert serve.banner["Models"] == "churn (default)"
        eventually_sync(lambda: bool(serve.get("/models")["models"]), "it is announced")
        (model,) = serve.get("/models")["models"]
        assert (model["model"], model["version"], model["default"]) == ("churn", "1", True)


@pytest.mark.soak
def test_the_banner_does_not_list_models_whose_files_are_visibly_broken(tmp_path: Path) -> None:
    content = zoo.mlp([3, 2]).SerializeToString()
    for name, file_content in {"a": content, "cut": content[:-9], "empty": b""}.items():
        (tmp_path / f"{name}.onnx").write_bytes(file_content)
    zoo.place(tmp_path, "wrong", zoo.mlp([3, 2]), toml="oops")
    data_dir = str(tmp_path / "data")
    with running_serve(
        "--model-dir", str(tmp_path), "--default-model", "a", DATA_DIR=data_dir
    ) as serve:
        url = serve.banner["URL"]
        assert (
            serve.banner["Models"] == f"a (default); not cut, empty, wrong: {url}/models says why"
        )
        broken = {("cut", "1"), ("empty", "1"), ("wrong", None)}

        def listed() -> set[tuple[str, str | None]]:
            problems = serve.get("/models")["problems"]
            return {(problem["model"], problem["version"]) for problem in problems}

        eventually_sync(lambda: listed() == broken, "the page lists what is broken")


@pytest.mark.system("curl")
def test_sigterm_ends_all_processes_and_the_next_start_has_the_jobs() -> None:
    with running_serve() as serve:
        job_id = wait_for_result(serve)["job_id"]
        pids = serve.child_pids()
        serve.process.process.terminate()
        assert serve.process.process.wait(15) == 0
        assert len(pids) == 2
        assert all(map(is_gone, pids))

    with running_serve() as serve:
        assert serve.get(f"/job/{job_id}")["result"]["class_name"] == "setosa"


@pytest.mark.soak  # `tests/processes/` shows it of each process by default
@pytest.mark.system("curl")
def test_a_killed_serve_leaves_neither_valkey_nor_worker_after_5_s() -> None:
    with running_serve() as serve:
        job_id = wait_for_result(serve)["job_id"]
        pids = serve.child_pids()
        serve.process.kill()
        eventually_sync(lambda: all(map(is_gone, pids)), "both have ended", seconds=5)

    with running_serve() as serve:
        assert serve.get(f"/job/{job_id}")["status"] == "completed"


def test_a_second_serve_on_one_data_dir_is_refused(
    served: ServeProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = served.process.environ["DATA_DIR"]
    message = refusal(capsys, "serve", "--port", str(free_port()), "--data-dir", data_dir)

    assert f"pid {served.process.process.pid}" in message
    assert all(word in message for word in ("DATA_DIR", "asyncinfer work"))


@pytest.mark.soak
def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with python_process("-m", "asyncinfer", "serve", "--port", port) as process:
            assert process.process.wait() == EXIT_REFUSED
            assert f"127.0.0.1:{port}" in process.read_stderr()


def test_a_worker_joins_a_running_serve_through_its_folder(served: ServeProcess) -> None:
    with python_process("-m", "asyncinfer", "work", DATA_DIR=served.process.environ["DATA_DIR"]):
        eventually_sync(lambda: served.get("/health")["workers"] == 2, "there are two workers")
