"""The commands do what they say, or say what to do."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from asyncinfer import __version__, settings
from asyncinfer.api_keys import Caller, Keyring
from asyncinfer.cli import main
from tests import zoo
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY, is_gone, parent
from tests.serving import REFUSED, Serve, answer_of, free_port, serving


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for knob in settings.knobs():
        monkeypatch.delenv(knob.variable, raising=False)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asyncinfer: ")
    assert err.count("\n") == 1
    return err


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(capsys, "--version") == f"asyncinfer {__version__}\n"


@pytest.mark.parametrize("command", ["serve", "work"])
def test_help_shows_every_setting_with_its_flag_variable_and_unit(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    shown = " ".join(help_of(capsys, command, "--help").split())

    for knob in settings.knobs():
        assert f" {knob.flag}" in shown
        assert f"{knob.unit}. [{knob.variable}]" in shown


def test_a_wrong_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--port is '70000'" in refusal(capsys, "serve", "--port", "70000")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_a_public_address_without_keys_is_refused(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "serve", "--host", host)

    assert all(word in said for word in ("keygen", "API_KEYS", "--insecure"))


def test_work_without_a_redis_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "work")

    assert all(word in said for word in ("REDIS_URL", "asyncinfer serve", "DATA_DIR"))


_AS_A_NATIVE_MODULE: Final = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass
except BaseException as error:
    raise ImportError("initialization failed") from error
"""
"""ONNX Runtime's own import makes an ImportError of every exception that comes into it."""


def test_a_worker_that_is_stopped_while_it_imports_ends_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(_AS_A_NATIVE_MODULE)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    environ = {**os.environ, "PYTHONPATH": path, "REDIS_URL": "redis://127.0.0.1:1"}

    ended = subprocess.run(
        [sys.executable, "-m", "asyncinfer", "work"],
        env=environ,
        capture_output=True,
        check=False,
        timeout=30,
    )

    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_model_folder_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = ("--redis-url", "redis://127.0.0.1:1")

    assert f"MODEL_DIR {tmp_path}/no" in refusal(
        capsys, "work", *url, "--model-dir", f"{tmp_path}/no"
    )


@pytest.mark.parametrize(
    ("name", "more", "said"),
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
    more: tuple[str, ...],
    said: str,
) -> None:
    if name != "no.onnx":
        (tmp_path / name).write_bytes(b"")
    url = ("--redis-url", "redis://127.0.0.1:1")
    assert said in refusal(capsys, command, *url, "--model", str(tmp_path / name), *more)


def test_a_default_model_that_the_folder_does_not_have_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    zoo.place(tmp_path, "wine", zoo.mlp([3, 2]))
    zoo.place(tmp_path, "churn", zoo.mlp([3, 2]))
    said = refusal(capsys, "serve", "--model-dir", str(tmp_path), "--default-model", "nope")

    assert all(word in said for word in ("'nope'", str(tmp_path), "churn, wine"))


@pytest.mark.parametrize("command", ["serve", "work"])
def test_models_that_do_not_exist_end_the_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    zoo.place(tmp_path, "iris", zoo.adds(1))
    asked = ("--redis-url", "redis://127.0.0.1:1", "--model-dir", str(tmp_path))
    work = ("--work",) if command == "serve" else ()

    said = refusal(capsys, command, *work, *asked, "--models", "nope,none")

    assert f"MODELS names none, nope, and {tmp_path} has no such model" in said


# --- keygen ----------------------------------------------------------------------------------


def test_a_made_key_is_let_in_by_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(("keygen", "--tenant", "acme", "--scopes", "submit,read")) == 0
    line, shown = capsys.readouterr()
    key = next(word for word in shown.split() if word.startswith("ai_"))
    (tmp_path / "keys").write_text(line)

    caller = Keyring.load(tmp_path / "keys").identify(key)

    assert caller is not None
    assert caller == Caller("acme", frozenset({"submit", "read"}))
    assert key not in line


def test_a_key_of_an_unknown_scope_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "submit, read, admin" in refusal(capsys, "keygen", "--scopes", "write")


# --- serve, all of it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A `serve` with nothing set, in a folder of its own; what it is asked leaves no trace."""
    folder = tmp_path_factory.mktemp("anywhere")
    environ = {"DATA_DIR": str(folder / "data"), "PYTHONPATH": str(REPOSITORY)}
    with pytest.MonkeyPatch.context() as patch:
        for knob in settings.knobs():
            patch.delenv(knob.variable, raising=False)
        with serving(cwd=folder, **environ) as serve:
            yield serve


def test_one_line_runs_it_and_the_pasted_curl_line_gets_a_result(served: Serve) -> None:
    assert answer_of(served)["result"]["class_name"] == "setosa"
    assert served.welcome["Redis"].startswith("Valkey ")


def test_it_works_from_any_folder_with_the_shipped_models(served: Serve) -> None:
    assert "iris (default)" in served.welcome["Models"]


def test_one_file_from_anywhere_is_served_as_the_default_model(tmp_path: Path) -> None:
    file = tmp_path / "churn.onnx"
    file.write_bytes(zoo.mlp([3, 2]).SerializeToString())
    with serving("--model", str(file), DATA_DIR=str(tmp_path / "data")) as serve:
        assert serve.welcome["Models"] == "churn (default)"
        eventually_sync(lambda: bool(serve.get("/models")["models"]), "it is announced")
        (model,) = serve.get("/models")["models"]
        assert (model["model"], model["version"], model["default"]) == ("churn", "1", True)


def test_the_welcome_names_no_model_that_is_broken_at_a_glance(tmp_path: Path) -> None:
    content = zoo.mlp([3, 2]).SerializeToString()
    for name, written in {"a": content, "cut": content[:-9], "empty": b""}.items():
        (tmp_path / f"{name}.onnx").write_bytes(written)
    zoo.place(tmp_path, "wrong", zoo.mlp([3, 2]), toml="oops")
    data_dir = str(tmp_path / "data")
    with serving("--model-dir", str(tmp_path), "--default-model", "a", DATA_DIR=data_dir) as serve:
        url = serve.welcome["URL"]
        assert (
            serve.welcome["Models"] == f"a (default); not cut, empty, wrong: {url}/models says why"
        )
        eventually_sync(lambda: bool(serve.get("/models")["models"]), "it is announced")
        problems = serve.get("/models")["problems"]
    assert {(one["model"], one["version"]) for one in problems} == {
        *(("cut", "1"), ("empty", "1"), ("wrong", None))
    }


def test_sigterm_ends_all_of_it_and_the_next_start_has_its_jobs() -> None:
    with serving() as serve:
        job_id = answer_of(serve)["job_id"]
        pids = serve.children()
        serve.process.process.terminate()
        assert serve.process.process.wait(15) == 0
        assert len(pids) == 2
        assert all(map(is_gone, pids))

    with serving() as serve:
        assert serve.get(f"/job/{job_id}")["result"]["class_name"] == "setosa"


def test_a_killed_serve_leaves_neither_valkey_nor_worker_after_5_s() -> None:
    with serving() as serve:
        job_id = answer_of(serve)["job_id"]
        pids = serve.children()
        serve.process.kill()
        eventually_sync(lambda: all(map(is_gone, pids)), "both have ended", seconds=5)

    with serving() as serve:
        assert serve.get(f"/job/{job_id}")["status"] == "completed"


def test_a_second_serve_on_one_data_dir_is_refused(
    served: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = served.process.environ["DATA_DIR"]
    said = refusal(capsys, "serve", "--port", str(free_port()), "--data-dir", data_dir)

    assert f"pid {served.process.process.pid}" in said
    assert all(word in said for word in ("DATA_DIR", "asyncinfer work"))


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with parent("-m", "asyncinfer", "serve", "--port", port) as it:
            assert it.process.wait() == REFUSED
            assert f"127.0.0.1:{port}" in it.complaints()


def test_a_worker_joins_a_running_serve_through_its_folder(served: Serve) -> None:
    with parent("-m", "asyncinfer", "work", DATA_DIR=served.process.environ["DATA_DIR"]):
        eventually_sync(lambda: served.get("/health")["workers"] == 2, "there are two workers")
