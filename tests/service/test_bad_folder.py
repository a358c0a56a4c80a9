"""A model folder with many bad files: the good models are served, each problem is logged once."""

import asyncio
import json
import os
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from asyncinfer.cli.doctor.models import examine_models
from asyncinfer.errors import ModelDirUnreadable
from asyncinfer.worker.models.source import ModelSource
from tests import unprivileged, zoo
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY, PythonProcess

ONNX = zoo.adds(1).SerializeToString()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "lfs.onnx": (LFS, "a Git LFS pointer, not the model: run `git lfs pull`"),
    "page/1/model.onnx": (b"<!DOCTYPE html><html><body>Sign in", "an HTML page, not the model"),
    "short.onnx": (ONNX[:-9], "bytes are missing at its end; copy or download it again"),
    "empty.onnx": (b"", "it is empty"),
    "torch.onnx": (b"PK\3\4" + bytes(26) + b"archive/data.pkl", "a PyTorch file"),
    "latin/labels.txt": ("Käse\n".encode("latin-1"), "latin/labels.txt: is not UTF-8 (byte 0xe4"),
    "utf16/model.toml": ("pinned = true\n".encode("utf-16"), "utf16/model.toml: is UTF-16; save"),
    "nested/1/onnx/model.onnx": (ONNX, "lies a folder too deep"),
    "stray/model.onnx": (ONNX, "has no version folder"),
    "two/1/a.onnx": (ONNX, "has several ONNX files"),
    "closed/1/model.onnx": (ONNX, "closed: cannot be read: Permission denied"),
    "mine.onnx": (ONNX, "mine.onnx: cannot be read: Permission denied"),
    "good.onnx": (ONNX, "is not served, since good/1/model.onnx has its name"),
    "not ours.onnx": (ONNX, "rename it"),
}
"""The bad files: their content, and a part of the message about each."""


def fill(folder: Path) -> None:
    other_files = {
        "good/1/model.onnx": ONNX,
        "also/1/also.ONNX": zoo.adds(2).SerializeToString(),
        "bom/1/model.onnx": ONNX,
        "bom/model.toml": b"\xef\xbb\xbfpinned = true\r\n",
        "latin/1/model.onnx": ONNX,
        "latin/model.toml": b'labels = "labels.txt"',
        "utf16/1/model.onnx": ONNX,
        "two/1/b.onnx": ONNX,
        "lost+found/x": b"",
        "Thumbs.db": b"",
    }
    bad_files = {name: content for name, (content, _) in BAD_FILES.items()}
    for name, content in {**other_files, **bad_files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.onnx")
    (folder / "gone.onnx").symlink_to("nowhere")
    for name in ("closed", "mine.onnx", "lost+found"):
        (folder / name).chmod(0)


MESSAGES = [
    *(message for _, message in BAD_FILES.values()),
    *("is a FIFO, not a file", "leads to no file"),
]


class UnprivilegedServe:
    """`asyncinfer serve` without root's right to read every file."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self._port = free_port()
        environ = {"DATA_DIR": str(data_dir), "MODEL_DIR": str(folder), "RESCAN_SECONDS": "0.2"}
        argv = ["-m", "asyncinfer", "serve", "--port", str(self._port), "--default-model", "good"]
        self.process = PythonProcess(argv, environ, REPOSITORY, unprivileged.drop)

    def get(self, path: str, body: object = None) -> Any:
        url = f"http://127.0.0.1:{self._port}{path}"
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "prefer": "wait=20"}
        with urllib.request.urlopen(
            urllib.request.Request(url, content, headers), timeout=30
        ) as response:
            return json.load(response)

    def predict(self, model: str) -> float:
        """The result for the input 1."""
        job = self.get(f"/predict/{model}", {"data": [[1]]})
        return float(job["result"]["outputs"][0]["data"][0])

    def serves(self, *names: str) -> bool:
        try:
            listed = self.get("/models")["models"]
        except OSError:
            return False
        return {model["model"] for model in listed if model["workers"]} == set(names)

    def problems(self) -> str:
        """The reasons that /models gives, a line each."""
        listed = self.get("/models")
        problems = [
            *listed["problems"],
            *(problem for model in listed["models"] for problem in model["problems"]),
        ]
        return "\n".join(problem["reason"] for problem in problems)

    def stop(self) -> str:
        """Stops the service; returns its log."""
        self.process.process.terminate()
        log = self.process.read_stderr()
        assert self.process.process.wait() == 0
        return log


def missing_messages(text: str) -> list[str]:
    return [message for message in MESSAGES if message not in text]


@pytest.mark.soak
def test_bad_files_in_the_folder_stop_no_good_model_and_are_logged_once(tmp_path: Path) -> None:
    unprivileged.skip_unless_possible()
    fill(tmp_path / "models")
    serve = UnprivilegedServe(tmp_path / "models", tmp_path / "data")
    with closing(serve.process):
        eventually_sync(lambda: serve.serves("good", "also", "bom"), "the good ones are served")
        assert (serve.predict("good"), serve.predict("also"), serve.predict("bom")) == (2, 3, 2)
        eventually_sync(lambda: not missing_messages(serve.problems()), "each problem is listed")

        (tmp_path / "models" / "mine.onnx").chmod(0o644)
        good = ("good", "also", "bom", "mine")
        eventually_sync(lambda: serve.serves(*good), "a file that was made readable is served")
        assert (serve.predict("good"), serve.predict("mine")) == (2, 2)
        log = serve.stop()

    assert {message: log.count(message) for message in MESSAGES} == dict.fromkeys(MESSAGES, 1)
    assert log.count("lost+found is ignored") == 1
    assert "Traceback" not in log
    assert "cannot be watched" not in log


def test_the_doctor_says_what_is_wrong_with_each_entry_of_the_folder(tmp_path: Path) -> None:
    unprivileged.skip_unless_possible()
    for name in ("closed/1", "lost+found", "pipe/1"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe" / "1" / "model.onnx")
    for name in ("closed", "lost+found"):
        (tmp_path / name).chmod(0)

    with unprivileged.unprivileged():
        findings = asyncio.run(examine_models(ModelSource(tmp_path), allow_custom_ops=False))

    for name in ("closed", "lost+found"):
        (tmp_path / name).chmod(0o700)
    found = {(finding.verdict, finding.about): finding.found for finding in findings}
    assert "lost+found is ignored" in "".join(finding.found for finding in findings)
    assert found["problem", "model closed"] == "cannot be read: Permission denied"
    assert "is a FIFO" in found["problem", "model pipe/1"]


def test_an_unreadable_model_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    unprivileged.skip_unless_possible()
    tmp_path.chmod(0)
    with (
        unprivileged.unprivileged(),
        pytest.raises(ModelDirUnreadable, match=r"cannot be read: Permission denied; give"),
    ):
        ModelSource(tmp_path).files()
    tmp_path.chmod(0o700)
