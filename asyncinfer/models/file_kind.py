"""Guesses what a file is that is not an ONNX model in spite of its name, from its first bytes."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_HEAD_BYTES: Final = 1024
_EXPORT: Final = "export the model to ONNX"
_UNPACK: Final = "unpack it, and put the .onnx file here"
_DOWNLOAD: Final = "download the model again"

_LFS: Final = b"version https://git-lfs.github.com/spec/"
_HTML: Final = (b"<!doctype html", b"<html")
_MAGIC: Final[tuple[tuple[int, bytes, str, str], ...]] = (
    (0, _LFS, "a Git LFS pointer", "run `git lfs pull`"),
    (0, b"version https://hawser.github.com/spec/", "a Git LFS pointer", "run `git lfs pull`"),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (4, b"TFL3", "a TensorFlow Lite file", f"{_EXPORT}: python -m tf2onnx.convert --tflite"),
    (
        4,
        b"ORTM",
        "a file in ONNX Runtime's own ORT format",
        "put the .onnx file here that it was made from",
    ),
    (0, b"\x89HDF", "an HDF5 file, such as Keras saves", f"{_EXPORT}: model.export(format='onnx')"),
    (0, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9", "a PyTorch file", f"{_EXPORT}: torch.onnx.export"),
    (0, b"GGUF", "a GGUF file", _EXPORT),
    (0, b"CBM1", "a CatBoost file", f"{_EXPORT}: save_model(path, format='onnx')"),
    (0, b"\x93NUMPY", "an array of numpy", _EXPORT),
    (0, b"%PDF", "a PDF", _DOWNLOAD),
    (0, b"\x7fELF", "a program", _DOWNLOAD),
    (0, b"\x89PNG", "a picture", _DOWNLOAD),
)
_IN_ZIP: Final = (
    (b"data.pkl", "a PyTorch file", f"{_EXPORT}: torch.onnx.export"),
    (b".npy", "a .npz of numpy", _EXPORT),
    (b"model.weights.h5", "a Keras file", f"{_EXPORT}: model.export(format='onnx')"),
)
_PICKLE_PROTOCOLS: Final = range(2, 6)
_MAX_SAFETENSORS_HEADER_BYTES: Final = 100 << 20


def guess_instead_of_weights(path: Path) -> str:
    """What a file of weights is instead, and what to do, in words; empty if it may be weights.

    As weights may begin with any bytes, only kinds count whose first bytes are never weights.
    Raises OSError.
    """
    head = _head(path)
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the weights: run `git lfs pull`"
    if head.lstrip().lower().startswith(_HTML):
        return "an HTML page, not the weights: download them again"
    return ""


def guess_instead_of_model(path: Path) -> str:
    """What the file is, and what to do, in words; empty if its first bytes do not say.

    Call it for a file that is known not to be a model. Raises OSError.
    """
    found = next(_guesses(_head(path)), None)
    return f"{found[0]}, not the model: {found[1]}" if found else ""


def _head(path: Path) -> bytes:
    """The first 1,024 bytes of a file."""
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _guesses(head: bytes) -> Iterator[tuple[str, str]]:
    """Pairs of a kind and its remedy in words, the most likely first."""
    for offset, magic, kind, remedy in _MAGIC:
        if head.startswith(magic, offset):
            yield kind, remedy
    if head.startswith(b"PK\3\4"):
        for member, kind, remedy in _IN_ZIP:
            if member in head:
                yield kind, remedy
        yield "a zip archive", _UNPACK
    if head[:1] == b"\x80" and head[1:2] and head[1] in _PICKLE_PROTOCOLS:
        yield "a Python pickle", f"{_EXPORT}, for scikit-learn with skl2onnx"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_SAFETENSORS_HEADER_BYTES:
        yield "a safetensors file", _EXPORT
    if not head.strip(b"\0"):
        yield "zeros, as an incomplete download leaves", _DOWNLOAD
    yield from _texts(head)


def _texts(head: bytes) -> Iterator[tuple[str, str]]:
    """A pair of the kind of text and its remedy; none if it is no text.

    It may be in UTF-16, as Windows tools write it.
    """
    is_utf_16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = head.decode("utf-16", "ignore") if is_utf_16 else _decoded(head)
    except UnicodeDecodeError:
        return
    if not all(character.isprintable() or character.isspace() for character in text):
        return
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith("<") and ("<html" in start or "<!doctype html" in start):
        yield "an HTML page", _DOWNLOAD
    elif start.startswith("<"):
        yield "an XML document, such as an error of a download", _DOWNLOAD
    elif start.startswith(("{", "[")):
        yield "JSON", _DOWNLOAD
    elif len(text) > 1:
        yield "text", _DOWNLOAD


def _decoded(head: bytes) -> str:
    """Decodes UTF-8; raises UnicodeDecodeError.

    The last character may be cut off where the head ends; then it is left out.
    """
    return codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD_BYTES)
