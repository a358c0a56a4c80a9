"""What an operator writes beside a model is taken, or refused by its key."""

from pathlib import Path

import pytest

from asyncinfer.errors import ModelRefused
from asyncinfer.model_toml import ModelConfig, read_config

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


def refusal(toml: bytes, folder: Path | None = None) -> str:
    with pytest.raises(ModelRefused) as refused:
        read_config(toml, "m.toml", folder)
    return refused.value.detail


def test_every_key_is_read() -> None:
    config = read_config(EVERYTHING, "m.toml")

    assert (config.default_version, config.pinned, config.scores) == (3, True, "logits")
    assert config.outputs == ("p", "label")
    assert config.batching.max_wait_ms == 2.5
    assert config.session.devices == (0, 1)
    assert config.example == {"x": [[1, 2]]}
    assert read_config(b"", "m.toml") == ModelConfig()


def test_labels_may_lie_in_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeffcat\nsea lion\nüber\n\n", "utf-8")

    assert read_config(b'labels = "labels.txt"', "m.toml", tmp_path).labels == (
        "cat",
        "sea lion",
        "über",
    )


@pytest.mark.parametrize("name", ["../labels.txt", "/etc/hostname", "none.txt", "link.txt", ".."])
def test_labels_lie_nowhere_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "link.txt").symlink_to("/etc/hostname")

    assert refusal(f'labels = "{name}"'.encode(), tmp_path).startswith("m.toml: labels: ")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (b"[session]\nprovider = 1", "unknown key `session.provider`; the nearest known one is"),
        (b"[session]\ngraph_optimization = 'max'", "$.session.graph_optimization"),
        (b"[session]\nproviders = []", "$.session.providers"),
        (b"[batching]\nmax_jobs = 0", "$.batching.max_jobs"),
        (b"[batching]\naxis = -1", "$.batching.axis"),
        (b"scores = 'odds'", "$.scores"),
        (b"pinned = 1", "$.pinned"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(toml: bytes, message: str) -> None:
    assert message in refusal(toml)


def test_an_example_with_gaps_is_one_that_json_can_carry() -> None:
    """It is announced, shown and sent as it is shown."""
    config = read_config(b"example = [[nan, 1.5, inf], [-inf, 2, -nan]]", "m.toml")

    assert config.example == [["NaN", 1.5, "Infinity"], ["-Infinity", 2, "NaN"]]
