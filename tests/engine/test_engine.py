"""The engine: answers as in bare ONNX Runtime, runs that can be stopped, errors with a reason."""

import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from asyncinfer.engine import Engine, Stop, Stopped
from asyncinfer.errors import InvalidInput, ModelFailed, ModelRefused, OutOfMemory
from asyncinfer.models.folder import scan
from asyncinfer.models.validation import check_data, check_inputs
from asyncinfer.tensors.datatypes import Array, Feeds, TensorSpec
from tests import zoo
from tests.models.single_result import render_result
from tests.process import REPOSITORY

ROOT = Path(__file__).parents[2]


def load(folder: Path, probe_seconds: float = 5.0) -> Engine:
    (file,) = scan(folder)
    return Engine.load(file, intra_op_threads=1, probe_seconds=probe_seconds)


def load_model(folder: Path, model: onnx.ModelProto, toml: str = "") -> Engine:
    zoo.place(folder, "m", model, toml=toml)
    return load(folder)


def load_error(folder: Path) -> str:
    with pytest.raises(ModelRefused) as refused:
        load(folder)
    return refused.value.detail


def feeds_of(engine: Engine, data: Array) -> Feeds:
    return {engine.signature.inputs[0].name: data}


def column(*values: float) -> Array:
    return np.array([[value] for value in values], np.float32)


# --- run ---------------------------------------------------------------------------------------


def test_answers_are_those_of_bare_onnx_runtime(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.mlp([16, 32, 4]))
    path = tmp_path / "m/1/model.onnx"
    bare = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    data = np.random.default_rng(0).random((5, 16), np.float32)

    (output,) = engine.run(feeds_of(engine, data), Stop())

    np.testing.assert_array_equal(output, bare.run(None, {"x": data})[0])


def test_threads_share_a_model_without_mixing_their_answers(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.slow(steps_per_unit=10))

    def answer(value: int) -> float:
        return float(engine.run(feeds_of(engine, column(value)), Stop())[0].item())

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(200))) == list(range(200))


@pytest.mark.soak
def test_a_loop_of_hours_stops_within_a_second(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.loop_for_hours())
    for _ in range(3):
        if (seconds := _seconds_to_stop(engine)) < 1:
            break  # a busy machine may delay one or two
    assert seconds < 1


def _seconds_to_stop(engine: Engine) -> float:
    stop = Stop()
    stopped_at: list[float] = []

    def stop_run() -> None:
        stopped_at.append(time.monotonic())
        stop.stop()

    timer = threading.Timer(0.1, stop_run)
    timer.start()
    with pytest.raises(Stopped):
        engine.run(feeds_of(engine, column(0)), stop)
    timer.join()
    return time.monotonic() - stopped_at[0]


def test_a_stop_stops_no_other_run_of_the_model(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.slow())
    stop = Stop()
    with ThreadPoolExecutor(2) as pool:
        endless = pool.submit(engine.run, feeds_of(engine, column(zoo.FOREVER)), stop)
        other = pool.submit(engine.run, feeds_of(engine, column(100)), Stop())
        stop.stop()
        stop.stop()

        assert other.result()[0].item() == 100
        assert isinstance(endless.exception(), Stopped)


@pytest.mark.soak
def test_a_run_that_was_stopped_before_it_began_does_not_begin(tmp_path: Path) -> None:
    stop = Stop()
    stop.stop()

    with pytest.raises(Stopped):
        load_model(tmp_path, zoo.loop_for_hours()).run({"n": column(0)}, stop)


def test_a_run_that_fails_names_the_node_and_repeats_nothing_of_the_input(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = load_model(tmp_path, zoo.picky())

    with pytest.raises(ModelFailed) as failed:
        engine.run(feeds_of(engine, column(1, 77)), Stop())

    assert failed.value.detail == "ONNX Runtime refused the input: INVALID_ARGUMENT in Gather pick"
    assert capfd.readouterr() == ("", "")
    assert engine.run(feeds_of(engine, column(1, 2)), Stop())[0].tolist() == [[1], [2]]


def test_input_of_a_wrong_shape_is_the_input_s_fault(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.mlp([4, 2]))

    with pytest.raises(ModelFailed, match=r"INVALID_ARGUMENT$"):
        engine.run(feeds_of(engine, column(1)), Stop())


def test_a_lack_of_memory_is_an_error_of_its_own(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.hungry())

    with pytest.raises(OutOfMemory, match="not enough memory"):
        engine.run(feeds_of(engine, column(zoo.ENDLESS_MIB)), Stop())

    assert engine.run(feeds_of(engine, column(1)), Stop())[0].item() == 1


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits the address space")
def test_a_lack_of_memory_that_passes_leaves_the_model_working(tmp_path: Path) -> None:
    zoo.place(tmp_path, "m", zoo.hungry())
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from asyncinfer.models import folder
from asyncinfer.engine import Engine, Stop
from asyncinfer.errors import OutOfMemory

(file,) = folder.scan(Path(sys.argv[1]))
engine = Engine.load(file, intra_op_threads=1)
wanted = {engine.signature.inputs[0].name: np.array([[256]], np.float32)}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, unlimited[1]))
try:
    engine.run(wanted, Stop())
except OutOfMemory:
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    print(engine.run(wanted, Stop())[0].item())
"""

    assert run_python(script, tmp_path).stdout == "256.0\n"


def test_nan_from_a_model_reads_as_a_word(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.unary("Log"))

    result = render_result(
        engine.run(feeds_of(engine, np.array([[-1, 0], [1, np.inf]], np.float32)), Stop()),
        engine.signature,
    )

    assert msgspec.json.decode(result)["outputs"] == [
        {
            "name": "y",
            "datatype": "FP32",
            "shape": [2, 2],
            "data": ["NaN", "-Infinity", 0.0, "Infinity"],
        }
    ]


# --- load --------------------------------------------------------------------------------------


def test_the_signature_says_what_the_graph_says(tmp_path: Path) -> None:
    toml = 'description = "words"\n[limits]\nmax_rows_per_job = 7\n'
    signature = load_model(tmp_path, zoo.mlp([4, 3]), toml).signature

    assert (signature.model, signature.version) == ("m", "1")
    assert signature.inputs == (TensorSpec("x", "FP32", ("batch", 4)),)
    assert signature.outputs == (TensorSpec("y", "FP32", ("batch", 3)),)
    content = (tmp_path / "m/1/model.onnx").read_bytes()
    assert signature.sha256 == hashlib.sha256(content).hexdigest()
    assert signature.description == "words"
    assert signature.max_rows == 7


@pytest.mark.parametrize(
    ("datatype", "elem_type", "json"),
    [
        ("BOOL", TensorProto.BOOL, "[[true,false]]"),
        ("INT8", TensorProto.INT8, "[[-128,127]]"),
        ("INT16", TensorProto.INT16, "[[-1,1]]"),
        ("INT32", TensorProto.INT32, "[[-1,1]]"),
        ("INT64", TensorProto.INT64, f"[[{-(2**63)},{2**63 - 1}]]"),
        ("UINT8", TensorProto.UINT8, "[[0,255]]"),
        ("UINT16", TensorProto.UINT16, "[[0,1]]"),
        ("UINT32", TensorProto.UINT32, "[[0,1]]"),
        ("UINT64", TensorProto.UINT64, f"[[0,{2**64 - 1}]]"),
        ("FP16", TensorProto.FLOAT16, "[[0.5,65504.0]]"),
        ("FP32", TensorProto.FLOAT, "[[0.5,-1.0]]"),
        ("FP64", TensorProto.DOUBLE, "[[0.1,1e+300]]"),
        ("BYTES", TensorProto.STRING, '[["","é"]]'),
    ],
)
def test_every_datatype_goes_in_and_comes_out_unchanged(
    tmp_path: Path, datatype: str, elem_type: int, json: str
) -> None:
    engine = load_model(tmp_path, zoo.identity(elem_type))
    data = check_data(json.encode(), engine.signature)

    result = render_result(engine.run(feeds_of(engine, data), Stop()), engine.signature)

    assert engine.signature.inputs[0].datatype == datatype
    assert engine.signature.batched, engine.signature.batching
    (output,) = msgspec.json.decode(result)["outputs"]
    assert [output["data"]] == msgspec.json.decode(json)


@pytest.mark.parametrize(
    "nothing",
    ["?", "*", "-1", " ", "None", "NONE", "<unk>", "unknown", "Dynamic", "null", "N/A"],
)
def test_what_converters_call_an_unknown_dimension_is_no_name(tmp_path: Path, nothing: str) -> None:
    shape: zoo.Dims = [nothing, 3, nothing, "unk__12", "dynamic_width"]
    engine = load_model(tmp_path, zoo.identity(TensorProto.FLOAT, shape))
    wide = np.ones((1, 3, 2, 4, 5), np.float32)

    signature = engine.signature
    (checked,) = check_inputs({"x": wide}, signature).values()

    assert {spec.shape for spec in (*signature.inputs, *signature.outputs)} == {
        (None, 3, None, "unk__12", "dynamic_width")
    }
    assert engine.run(feeds_of(engine, checked), Stop())[0].shape == wide.shape


def test_a_negative_size_is_an_open_one(tmp_path: Path) -> None:
    model = zoo.identity(TensorProto.FLOAT, [-1, 2])

    assert load_model(tmp_path, model).signature.inputs[0].shape == (None, 2)


def test_an_output_alone_may_have_any_rank(tmp_path: Path) -> None:
    """As with a Reshape of which the file does not say how many dimensions it gives."""
    model = zoo.model(
        [helper.make_node("Reshape", ["x", "to"], ["y"])],
        [zoo.tensor("x", ["n"]), zoo.tensor("to", ["rank"], TensorProto.INT64)],
        [zoo.tensor("y", None)],
    )

    signature = load_model(tmp_path, model).signature

    assert [spec.shape for spec in signature.outputs] == [None]
    assert signature.inputs[0].shape == ("n",)


@pytest.mark.parametrize("shape", [(2,), ("n",), ("batch", 2, None), (3, 1, 2)])
@pytest.mark.parametrize("elem_type", [TensorProto.FLOAT, TensorProto.STRING, TensorProto.BOOL])
def test_the_example_that_is_made_up_works(tmp_path: Path, shape: zoo.Dims, elem_type: int) -> None:
    engine = load_model(tmp_path, zoo.identity(elem_type, shape))

    data = check_data(msgspec.json.encode(engine.signature.example), engine.signature)

    assert len(engine.run(feeds_of(engine, data), Stop())) == 1


def test_no_example_is_made_up_that_nobody_would_paste(tmp_path: Path) -> None:
    shape = ("batch", 3, 224, 224)

    assert load_model(tmp_path, zoo.identity(TensorProto.FLOAT, shape)).signature.example is None


def test_a_model_of_two_inputs_loads_and_takes_no_data(tmp_path: Path) -> None:
    engine = load_model(tmp_path, zoo.added())
    ones = np.ones((1, 2), np.float32)

    assert engine.run({"a": ones, "b": ones}, Stop())[0].tolist() == [[2, 2]]
    with pytest.raises(InvalidInput, match="takes 2 inputs"):
        check_data(b"[[1,1]]", engine.signature)


def test_weights_in_a_file_of_their_own_are_found(tmp_path: Path) -> None:
    zoo.place_poison(tmp_path, "m")

    engine = load(tmp_path)

    assert engine.run(feeds_of(engine, column(0, 63)), Stop())[0].tolist() == [[0], [63]]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 100])
def test_a_corrupt_file_is_refused_by_its_short_name(tmp_path: Path, content: bytes) -> None:
    path = zoo.place(tmp_path, "m", zoo.mlp([4, 3]))
    path.write_bytes(content)

    reason = load_error(tmp_path)

    assert reason.startswith("m/1/model.onnx: ")
    assert str(tmp_path) not in reason


def test_complex_numbers_are_refused_with_what_to_do(tmp_path: Path) -> None:
    zoo.place(tmp_path, "m", zoo.identity(TensorProto.COMPLEX64))

    reason = load_error(tmp_path)

    assert "tensor(complex64)" in reason
    assert reason.endswith("real and imaginary parts as tensors of their own")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = zoo.place(tmp_path, "m", zoo.mlp([4, 3]))
    path.write_bytes(path.read_bytes()[:-40])

    assert "m/1/model.onnx" in load_error(tmp_path)


def test_missing_and_short_weights_are_refused(tmp_path: Path) -> None:
    poison = zoo.place_poison(tmp_path, "m")
    poison.arm()
    short = load_error(tmp_path)
    poison.disarm()
    assert load(tmp_path)
    poison.weights.unlink()
    missing = load_error(tmp_path)

    assert short.startswith("m/1/model.onnx: ONNX Runtime cannot load it: ")
    assert str(tmp_path) not in short
    assert missing.startswith(
        "m/1/model.onnx: its weights lie in 'weights.bin', which is not there"
    )


def test_a_file_that_went_away_is_refused(tmp_path: Path) -> None:
    path = zoo.place(tmp_path, "m", zoo.mlp([4, 3]))
    (file,) = scan(tmp_path)
    path.unlink()

    with pytest.raises(ModelRefused, match=r"m/1/model\.onnx: cannot be read: No such file"):
        Engine.load(file, intra_op_threads=1)


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ("label = []", "m/model.toml: unknown key `label`"),
        ('labels = ["a"]', "m/model.toml: 1 labels, but no output of shape [batch, 1]"),
        ("example = [[1]]", "m/model.toml: example: /data/0: row 0 has 1 number, m takes 4"),
    ],
)
def test_a_model_toml_that_does_not_fit_is_refused(tmp_path: Path, toml: str, reason: str) -> None:
    zoo.place(tmp_path, "m", zoo.mlp([4, 3]), toml=toml)

    assert reason in load_error(tmp_path)


# --- batching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first_dim", ["batch", "N", None])
def test_rows_that_do_not_depend_on_each_other_are_batched(
    tmp_path: Path, first_dim: str | None
) -> None:
    signature = load_model(tmp_path, zoo.mlp([4, 8, 3], first_dim)).signature

    assert signature.batched, signature.batching


@pytest.mark.parametrize(
    "build",
    [zoo.running_sum, zoo.minus_mean, zoo.sorted_rows, zoo.positive_rows, zoo.recurrent],
)
def test_rows_that_depend_on_each_other_are_not_batched(
    tmp_path: Path, build: Callable[[], onnx.ModelProto]
) -> None:
    signature = load_model(tmp_path, build()).signature

    assert not signature.batched
    assert signature.batching.startswith("off: `y` ")


def test_model_toml_turns_batching_off_and_on(tmp_path: Path) -> None:
    off = "[batching]\nenabled = false"
    on = "[batching]\nenabled = true"

    assert not load_model(tmp_path / "off", zoo.mlp([4, 3]), off).signature.batched
    assert load_model(tmp_path / "on", zoo.minus_mean(), on).signature.batched
    zoo.place(tmp_path / "fixed", "m", zoo.mlp([4, 3], first_dim=1), toml=on)
    assert "the first dimension of `x` is fixed at 1" in load_error(tmp_path / "fixed")


def test_a_model_too_slow_to_probe_is_not_batched(tmp_path: Path) -> None:
    zoo.place(tmp_path, "m", zoo.loop_for_hours("batch"))

    signature = load(tmp_path, probe_seconds=0.05).signature

    assert not signature.batched
    assert signature.batching.startswith("off: probing took longer than 0.05 s; ")


# --- the zoo that other tests rely on ----------------------------------------------------------


@pytest.mark.parametrize(
    "build", [zoo.slow, zoo.huge_matmul, zoo.picky, zoo.hungry], ids=lambda build: build.__name__
)
def test_zoo_models_whose_values_decide_their_run_are_batched_and_give_their_input_back(
    tmp_path: Path, build: Callable[[], onnx.ModelProto]
) -> None:
    engine = load_model(tmp_path, build())

    assert engine.signature.batched, engine.signature.batching
    assert engine.run(feeds_of(engine, column(2, 1, 0)), Stop())[0].tolist() == [[2], [1], [0]]


def test_the_poison_kills_the_process_once_armed_and_only_above_zero(tmp_path: Path) -> None:
    zoo.place_poison(tmp_path, "m")
    script = """
import sys
from pathlib import Path
import numpy as np
from asyncinfer.models import folder
from asyncinfer.engine import Engine, Stop

(file,) = folder.scan(Path(sys.argv[1]))
engine = Engine.load(file, intra_op_threads=1)
assert engine.signature.batched, engine.signature.batching
from tests import zoo
zoo.Poison(file.path, file.path.parent / "weights.bin").arm()
print(engine.run({"x": np.array([[0]], np.float32)}, Stop())[0].item(), flush=True)
engine.run({"x": np.array([[1]], np.float32)}, Stop())
print("alive")
"""

    ended = run_python(script, tmp_path)

    assert ended.stdout == "0.0\n"
    assert ended.returncode == -signal.SIGBUS


def run_python(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_onnx_runtime_reports_no_model_to_its_maker(tmp_path: Path) -> None:
    """ONNX Runtime keeps telemetry in the user's cache until it is sent, unless that is off."""
    load = f"ort.InferenceSession({str(REPOSITORY / 'model' / 'iris' / '1' / 'model.onnx')!r})"
    environ = {"HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    code = f"from asyncinfer.engine.runtime import ort; {load}"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    assert not list(tmp_path.iterdir())
