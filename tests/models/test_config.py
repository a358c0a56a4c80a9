"""A model.toml is read, or rejected with the key that is wrong."""

import os
from pathlib import Path

import pytest

from asyncinfer.errors import ModelRefused
from asyncinfer.models.config import ModelConfig, read_config

EVERYTHING = b"""
labels = ["a", "b"]
description = "words"
default_version = 3
pinned = true
outputs = ["p", "label"]
scores = "logits"

[example]
x = [[1, 2]]

[batching]
enabled = true
max_jobs = 8
max_rows = 64
axis = 1
max_wait_ms = 2.5
pad = true

[limits]
timeout_seconds = 2
max_rows_per_job = 5

[session]
intra_op_threads = 2
providers = ["CUDAExecutionProvider"]
graph_optimization = "basic"
custom_ops = "onnxruntime-extensions"
devices = [0, 1]
"""


def rejection(toml: bytes, folder: Path | None = None) -> str:
    with pytest.raises(ModelRefused) as raised:
        read_config(toml, "m.toml", folder)
    return raised.value.detail


def test_every_key_is_read() -> None:
    config = read_config(EVERYTHING, "m.toml")

    assert (config.default_version, config.pinned, config.scores) == (3, True, "logits")
    assert config.outputs == ("p", "label")
    assert config.batching.max_wait_ms == 2.5
    assert config.session.devices == (0, 1)
    assert config.example == {"x": [[1, 2]]}
    assert read_config(b"", "m.toml") == ModelConfig()


def test_labels_may_be_in_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeffcat\nsea lion\nüber\n\n", "utf-8")

    assert read_config(b'labels = "labels.txt"', "m.toml", tmp_path).labels == (
        "cat",
        "sea lion",
        "über",
    )


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "bert", "id2label": {"1": "good", "0": "bad"}, "label2id": {"bad": 0}}',
        '["bad",\n "good"]',
        '{"0": "bad", "1": "good"}',
    ],
)
def test_labels_may_be_those_of_a_json_file(tmp_path: Path, content: str) -> None:
    """Exporters of Hugging Face write labels only into config.json."""
    (tmp_path / "config.json").write_text(content)

    labels = read_config(b'labels = "config.json"', "m.toml", tmp_path).labels

    assert labels == ("bad", "good")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "bert"}'),
        ("config.json", '{"id2label": {"0": "bad", "2": "good"}}'),
        ("config.json", '{"id2label": {"0": 1}}'),
        ("config.json", "[1, 2]"),
        ("config.json", "3"),
        ("config.json", "bad\ngood"),
        ("config.json", "[" * 100_000),
        ("names.yaml", "names:\n  0: bad\n"),
    ],
    ids=lambda value: value[:40],
)
def test_lines_of_another_format_are_not_read_as_labels(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)

    reason = rejection(f'labels = "{name}"'.encode(), tmp_path)

    assert reason.startswith(f"m.toml: labels: {name} ")


@pytest.mark.parametrize("name", ["../labels.txt", "/etc/hostname", "none.txt", "link.txt", ".."])
def test_a_labels_file_must_be_beside_model_toml(tmp_path: Path, name: str) -> None:
    (tmp_path / "link.txt").symlink_to("/etc/hostname")

    assert rejection(f'labels = "{name}"'.encode(), tmp_path).startswith("m.toml: labels: ")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (b"[session]\nprovider = 1", "unknown key `session.provider`; the nearest known one is"),
        (b"[session]\ngraph_optimization = 'max'", "`session.graph_optimization`"),
        (b"[session]\nproviders = []", "`session.providers`"),
        (b"[batching]\nmax_jobs = 0", "`batching.max_jobs`"),
        (b"[batching]\naxis = -1", "`batching.axis`"),
        (b"scores = 'odds'", "`scores`"),
        (b"pinned = 1", "`pinned`"),
    ],
)
def test_a_wrong_value_is_rejected_with_its_key(toml: bytes, message: str) -> None:
    assert message in rejection(toml)


def test_nonfinite_numbers_in_an_example_become_strings() -> None:
    """An example is announced and shown as JSON, and sent as it is shown."""
    config = read_config(b"example = [[nan, 1.5, inf], [-inf, 2, -nan]]", "m.toml")

    assert config.example == [["NaN", 1.5, "Infinity"], ["-Infinity", 2, "NaN"]]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfpinned = true", b"pinned = true\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(content: bytes) -> None:
    assert read_config(content, "m.toml").pinned


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("pinned = true".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("pinned = true".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        ('# \n description = "Käse"'.encode("latin-1"), "is not UTF-8 (byte 0xe4 in line 2); save"),
    ],
)
def test_another_encoding_is_named_with_the_remedy(content: bytes, problem: str) -> None:
    assert rejection(content).startswith(f"m.toml: {problem}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_labels_are_the_lines_of_their_file_for_every_line_end_and_encoding(
    tmp_path: Path, encoding: str, end: str
) -> None:
    labels = ("cat", "Käse", "line\u2028separator", "form\ffeed")
    (tmp_path / "l.txt").write_bytes(f"{end.join(labels)}{end}".encode(encoding))

    assert read_config(b'labels = "l.txt"', "m.toml", tmp_path).labels == labels


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("cat\nKäse\n".encode("latin-1"), "is not UTF-8 (byte 0xe4 in line 2); save it as UTF-8"),
        ("cat\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (bytes(5 << 20), "has more than 4194304 bytes"),
    ],
)
def test_an_unreadable_labels_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "l.txt").write_bytes(content)

    with pytest.raises(ModelRefused) as raised:
        read_config(b'labels = "l.txt"', "m/model.toml", tmp_path)

    assert raised.value.detail == f"m/l.txt: {problem}"


def test_a_fifo_as_labels_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "l.txt")

    assert rejection(b'labels = "l.txt"', tmp_path) == "l.txt: is a FIFO, not a file"
