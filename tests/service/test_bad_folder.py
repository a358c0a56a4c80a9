"""A service on a folder full of bad things serves the good model, and tells of each once."""

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
from asyncinfer.worker.models.source import Source
from tests import unprivileged, zoo
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY, Parent
from tests.serving import free_port

ONNX = zoo.adds(1).SerializeToString()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"

BAD: dict[str, tuple[bytes, str]] = {
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
"""What lies in the folder, and what is said of it."""


def fill(folder: Path) -> None:
    more = {
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
    for name, content in {**more, **{name: content for name, (content, _) in BAD.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.onnx")
    (folder / "gone.onnx").symlink_to("nowhere")
    for name in ("closed", "mine.onnx", "lost+found"):
        (folder / name).chmod(0)


WORDS = [*(words for _, words in BAD.values()), "is a FIFO, not a file", "leads to no file"]


class Served:
    """`asyncinfer serve` as a user who is not root."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self._port = free_port()
        environ = {"DATA_DIR": str(data_dir), "MODEL_DIR": str(folder), "RESCAN_SECONDS": "0.2"}
        argv = ["-m", "asyncinfer", "serve", "--port", str(self._port), "--default-model", "good"]
        self.process = Parent(argv, environ, REPOSITORY, unprivileged.drop)

    def get(self, path: str, body: object = None) -> Any:
        url = f"http://127.0.0.1:{self._port}{path}"
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "prefer": "wait=20"}
        with urllib.request.urlopen(
            urllib.request.Request(url, content, headers), timeout=30
        ) as it:
            return json.load(it)

    def ask(self, model: str) -> float:
        """What comes of 1."""
        job = self.get(f"/predict/{model}", {"data": [[1]]})
        return float(job["result"]["outputs"][0]["data"][0])

    def serves(self, *names: str) -> bool:
        try:
            listed = self.get("/models")["models"]
        except OSError:
            return False
        return {one["model"] for one in listed if one["workers"]} == set(names)

    def reasons(self) -> str:
        listed = self.get("/models")
        problems = [
            *listed["problems"],
            *(it for one in listed["models"] for it in one["problems"]),
        ]
        return "\n".join(one["reason"] for one in problems)

    def stop(self) -> str:
        """What it has logged."""
        self.process.process.terminate()
        log = self.process.complaints()
        assert self.process.process.wait() == 0
        return log


def missing_in(told: str) -> list[str]:
    return [words for words in WORDS if words not in told]


@pytest.mark.soak
def test_one_bad_thing_in_the_folder_stops_nothing_and_is_told_once(tmp_path: Path) -> None:
    unprivileged.skip_unless_possible()
    fill(tmp_path / "models")
    served = Served(tmp_path / "models", tmp_path / "data")
    with closing(served.process):
        eventually_sync(lambda: served.serves("good", "also", "bom"), "the good ones are served")
        assert (served.ask("good"), served.ask("also"), served.ask("bom")) == (2, 3, 2)
        eventually_sync(lambda: not missing_in(served.reasons()), "each bad thing is told")

        (tmp_path / "models" / "mine.onnx").chmod(0o644)
        good = ("good", "also", "bom", "mine")
        eventually_sync(lambda: served.serves(*good), "one that was mended is served")
        assert (served.ask("good"), served.ask("mine")) == (2, 2)
        log = served.stop()

    assert {words: log.count(words) for words in WORDS} == dict.fromkeys(WORDS, 1)
    assert log.count("lost+found is ignored") == 1
    assert "Traceback" not in log
    assert "cannot be watched" not in log


def test_a_doctor_tells_what_is_wrong_with_each_entry_of_the_folder(tmp_path: Path) -> None:
    unprivileged.skip_unless_possible()
    for name in ("closed/1", "lost+found", "pipe/1"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe" / "1" / "model.onnx")
    for name in ("closed", "lost+found"):
        (tmp_path / name).chmod(0)

    with unprivileged.unprivileged():
        findings = asyncio.run(examine_models(Source(tmp_path), allow_custom_ops=False))

    for name in ("closed", "lost+found"):
        (tmp_path / name).chmod(0o700)
    said = {(one.verdict, one.about): one.found for one in findings}
    assert "lost+found is ignored" in "".join(one.found for one in findings)
    assert "closed: cannot be read: Permission denied" in said["problem", "model closed"]
    assert "is a FIFO" in said["problem", "model pipe/1"]


def test_a_model_folder_that_may_not_be_read_is_told_in_a_line(tmp_path: Path) -> None:
    unprivileged.skip_unless_possible()
    tmp_path.chmod(0)
    with (
        unprivileged.unprivileged(),
        pytest.raises(ModelDirUnreadable, match=r"cannot be read: Permission denied; give"),
    ):
        Source(tmp_path).files()
    tmp_path.chmod(0o700)
