"""A file that only has the name of an ONNX model is rejected with its kind and a remedy."""

import gzip
import io
import json
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from asyncinfer.errors import ModelRefused
from asyncinfer.models import onnx_file
from tests import zoo

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
ONNX = zoo.mlp([4, 3]).SerializeToString()
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
PYTORCH_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.onnx"))
    return content.getvalue()


def npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, w=np.zeros(3))
    return content.getvalue()


def safetensors() -> bytes:
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(4)


def rejection(path: Path) -> str:
    with pytest.raises(ModelRefused) as raised:
        onnx_file.check_weights(path, "m.onnx")
    return raised.value.detail


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (LFS, "a Git LFS pointer, not the model", "run `git lfs pull`"),
        (b"\n <!DOCTYPE html>\n<html lang=en>", "an HTML page, not the model", "download"),
        (b"<HTML><body>404", "an HTML page, not the model", "download the model again"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey", "an XML document", "download"),
        (b'{"error": "not found"}', "JSON, not the model", "download the model again"),
        ("Zugriff verweigert für Sie".encode(), "text, not the model", "download"),
        ("Käse ".encode() * 400, "text, not the model", "download"),
        ("echo".encode("utf-16"), "text, not the model", "download"),
        (gzip.compress(ONNX), "a gzip archive", "unpack it"),
        (tarred(), "a tar archive", "unpack it"),
        (zipped("model.onnx"), "a zip archive", "unpack it"),
        (zipped("archive/data.pkl"), "a PyTorch file", "torch.onnx.export"),
        (PYTORCH_LEGACY, "a PyTorch file", "torch.onnx.export"),
        (npz(), "a .npz of numpy", "export the model to ONNX"),
        (pickle.dumps([1.5]), "a Python pickle", "skl2onnx"),
        (safetensors(), "a safetensors file", "export the model to ONNX"),
        (b"\x1c\0\0\0TFL3" + bytes(60), "a TensorFlow Lite file", "tf2onnx"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file", "export"),
        (PNG, "a picture", "download"),
        (bytes(5000), "zeros, as an incomplete download leaves", "download the model again"),
    ],
)
def test_a_file_that_is_not_onnx_is_named_by_its_kind(
    tmp_path: Path, content: bytes, kind: str, remedy: str
) -> None:
    (tmp_path / "m.onnx").write_bytes(content)

    message = rejection(tmp_path / "m.onnx")

    assert message.startswith(f"m.onnx: it is no ONNX file, but {kind}"), message
    assert remedy in message


def test_a_damaged_file_is_rejected_with_the_remedy(tmp_path: Path) -> None:
    for content in (random.Random(0).randbytes(5000), b"\x0b" + ONNX, ONNX + b"\x80"):
        (tmp_path / "m.onnx").write_bytes(content)
        message = rejection(tmp_path / "m.onnx")
        assert message.startswith("m.onnx: it is no ONNX file, or damaged: "), message
        assert message.endswith("; copy or download it again"), message


def test_a_truncated_file_is_rejected_with_the_number_of_missing_bytes(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(ONNX[:-9])

    assert "bytes are missing at its end; copy or download it again" in rejection(
        tmp_path / "m.onnx"
    )


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (LFS, "which is a Git LFS pointer, not the weights: run `git lfs pull`"),
        (b"\n<html>404", "which is an HTML page, not the weights: download them again"),
        (b"", "which is empty; copy or download it again"),
        (None, "which is not there; put the file itself beside the model"),
    ],
)
def test_external_weights_are_checked_too(
    tmp_path: Path, weights: bytes | None, problem: str
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(*(zoo.mlp([64, 64]), path), save_as_external_data=True, location="m.onnx.data")
    (tmp_path / "m.onnx.data").unlink()
    if weights is not None:
        (tmp_path / "m.onnx.data").write_bytes(weights)

    assert rejection(path) == f"m.onnx: its weights lie in 'm.onnx.data', {problem}"
