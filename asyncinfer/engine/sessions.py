"""Opening a model file: sessions with the configured providers, devices and custom operators."""

import hashlib
import re
from pathlib import Path
from typing import Any, Final

from asyncinfer.engine.runtime import ort
from asyncinfer.errors import ModelRefused
from asyncinfer.models import onnx_file, onnx_graph
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.onnx_graph import OnnxFile
from asyncinfer.untrusted import file_access

_CPU: Final = "CPUExecutionProvider"
_LOG_ERRORS: Final = 3
_LOG_NOTHING: Final = 4
_EXTENSIONS: Final = "onnxruntime-extensions"
_EXTENSIONS_DOMAIN: Final = "ai.onnx.contrib"

_WITH_DEVICES: Final = frozenset(
    {"CUDAExecutionProvider", "TensorrtExecutionProvider", "ROCMExecutionProvider"}
)

_OPTIMIZATIONS: Final = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def open_sessions(
    file: ModelFile, *, intra_op_threads: int, allow_custom_ops: bool
) -> tuple[list[ort.InferenceSession], str]:
    """Opens a session for each device, one in all if none is set; returns them and the SHA-256 of
    the model's file in hex. Raises ModelRefused."""
    options = _options(file, intra_op_threads)
    if file.config.session.custom_ops is not None:
        options.register_custom_ops_library(_custom_ops_library(file, allow_custom_ops))
    if problem := file_access.unreadable_reason(file.path):
        raise ModelRefused(f"{file.display_path}: {problem}")
    try:
        with file.path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        onnx_file.check_weights(file.path, file.display_path)
    except OSError as error:
        raise ModelRefused(f"{file.display_path}: {file_access.os_error_reason(error)}") from error
    return [_open(file, options, providers) for providers in _providers(file)], sha256


def read_graph(file: ModelFile) -> OnnxFile | None:
    """The graph of the file; None if it is too large to be read. Raises ModelRefused if it cannot
    be read or is damaged."""
    try:
        return onnx_graph.read(file.path)
    except onnx_graph.GraphTooLarge:
        return None
    except OSError as error:
        raise ModelRefused(f"{file.display_path}: {file_access.os_error_reason(error)}") from error
    except ValueError as error:
        raise ModelRefused(
            f"{file.display_path}: it is no ONNX file, or damaged: {error}"
        ) from error


def _open(
    file: ModelFile, options: ort.SessionOptions, providers: list[tuple[str, dict[str, Any]]]
) -> ort.InferenceSession:
    """Opens one session; raises ModelRefused if it fails or a provider did not start. `providers`
    are names with their options."""
    try:
        session = ort.InferenceSession(
            str(file.path), options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        problem = _load_error_text(error, file)
        raise ModelRefused(f"{file.display_path}: {problem}") from error
    started = session.get_providers()
    for name, _ in providers:
        if name not in started:
            raise ModelRefused(
                f"{file.model}/model.toml: session.providers: {name} could not be started here; "
                f"look at the log, or leave it out to run on {', '.join(started)}"
            )
    session.disable_fallback()
    return session


def _options(file: ModelFile, intra_op_threads: int) -> ort.SessionOptions:
    """The session options by `model.toml`, with `intra_op_threads` unless it sets a number."""
    config = file.config.session
    options = ort.SessionOptions()
    options.intra_op_num_threads = config.intra_op_threads or intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = _OPTIMIZATIONS[config.graph_optimization]
    # On the CPU all errors are raised. Why another provider does not start is only logged.
    options.log_severity_level = _LOG_ERRORS if config.providers else _LOG_NOTHING
    # A tiny model at 50 runs a second took 0.85 cores with spinning, 0.02 without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _providers(file: ModelFile) -> list[list[tuple[str, dict[str, Any]]]]:
    """For each device the providers of its session with their options, the CPU last. Raises
    ModelRefused for providers that are not installed, and for devices that no provider uses."""
    names = list(file.config.session.providers or (_CPU,))
    installed = ort.get_available_providers()
    for name in names:
        if name not in installed:
            raise ModelRefused(
                f"{file.model}/model.toml: session.providers: this onnxruntime has no {name}, "
                f"only {', '.join(installed)}{_provider_remedy(name)}"
            )
    if _CPU not in names:
        names.append(_CPU)
    devices = file.config.session.devices
    if devices and not _WITH_DEVICES.intersection(names):
        raise ModelRefused(
            f"{file.model}/model.toml: session.devices needs one of "
            f"{', '.join(sorted(_WITH_DEVICES))} in session.providers"
        )
    if not devices:
        return [[(name, {}) for name in names]]
    return [
        [(name, {"device_id": number} if name in _WITH_DEVICES else {}) for name in names]
        for number in devices
    ]


def _provider_remedy(name: str) -> str:
    """What to do about a provider that is missing, to be added to a message."""
    if name == "CUDAExecutionProvider":
        return "; pip install 'asyncinfer[cuda]' in place of onnxruntime"
    return "; install an onnxruntime that has it"


def _custom_ops_library(file: ModelFile, allow_custom_ops: bool) -> str:
    """The path of the library that `session.custom_ops` of `model.toml`, which must be set, names:
    a file in the model's folder, or "onnxruntime-extensions" for the one of that package. Raises
    ModelRefused if it is missing, not installed, outside the folder, or not `allow_custom_ops`."""
    wanted = file.config.session.custom_ops or ""
    shown = f"{file.model}/model.toml: session.custom_ops"
    if not allow_custom_ops:
        raise ModelRefused(f"{shown} is native code; set ALLOW_CUSTOM_OPS=true to load it")
    if wanted == _EXTENSIONS:
        try:
            from onnxruntime_extensions import get_library_path
        except ImportError as error:
            raise ModelRefused(f"{shown}: pip install 'asyncinfer[custom-ops]'") from error
        return str(get_library_path())
    folder = file.path.parent.parent.resolve()
    library = (folder / wanted).resolve()
    if Path(wanted).is_absolute() or not library.is_relative_to(folder) or not library.is_file():
        raise ModelRefused(f"{shown}: {wanted!r} is no file in the model's own folder")
    return str(library)


_LOCALE: Final = re.compile(r"Failed to construct locale with name:([\w.@-]+)")
_PREAMBLE: Final = re.compile(r"\[ONNXRuntimeError\] : -?\d+ : \w+ : (Load model from .* failed:)?")
_SOURCE_LOCATION: Final = re.compile(
    r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)?(?: \[with .*?\])? "
)

_REMEDIES: Final = (
    (
        re.compile(r"Unsupported model IR version: \d+, max supported IR version: (\d+)"),
        "; install a newer onnxruntime, or save the file again with `ir_version = {0}`, an "
        "attribute of what onnx.load gives",
    ),
    (
        re.compile(r"Current official support for domain ([\w.]+) is till opset (\d+)"),
        " Install a newer onnxruntime, or export it for opset {1} of {0}",
    ),
    (
        re.compile(r"Could not find an implementation for (\w+)"),
        "; this onnxruntime has no {0} of that opset or for these types: export it with others",
    ),
    (
        re.compile(r"\S+:(\w+)\(-?\d+\) is not a registered function/op"),
        "; name the library that has the operator {0} as session.custom_ops in model.toml, or "
        "export it with standard operators",
    ),
    (
        re.compile(r"tensor\(complex\w+\) is not currently registered"),
        "; let the graph take and give real and imaginary parts as tensors of their own",
    ),
)
"""Messages of ONNX Runtime, and what to do about each."""


def _load_error_text(error: Exception, file: ModelFile) -> str:
    """The message of ONNX Runtime in one line, without its own source paths, and what to do."""
    # ONNX Runtime names files by absolute paths, which clients must not see.
    text = _PREAMBLE.sub("", str(error))
    for folder in (file.path.parent, file.path.parent.resolve()):
        text = text.replace(f"{folder}/", "")
    problem = (text or type(error).__name__).splitlines()[0]
    problem = _SOURCE_LOCATION.sub("", problem)
    if found := _LOCALE.search(problem):
        return _locale_problem(found[1])
    if "out of bounds or can not be read in full" in problem:
        problem += " A file of weights is cut short, or another one: copy or download it again"
    if _EXTENSIONS_DOMAIN in problem and file.config.session.custom_ops is None:
        return (
            f"ONNX Runtime cannot load it: {problem}; set session.custom_ops = "
            f'"{_EXTENSIONS}" in model.toml'
        )
    for pattern, remedy in _REMEDIES:
        if found := pattern.search(problem):
            problem += remedy.format(*found.groups())
    return f"ONNX Runtime cannot load it: {problem}"


def _locale_problem(name: str) -> str:
    """The problem that the locale `name` is missing, and what to do: skl2onnx makes its text
    vectorizers need en_US.UTF-8, which slim images do not have."""
    language, _, encoding = name.partition(".")
    make = f"localedef -i {language} -f {encoding or 'UTF-8'} {name}"
    return (
        f"ONNX Runtime cannot load it: it asks for the locale {name}, which is not installed here. "
        f"Install it (apt-get install -y locales && {make}) "
        'and start the worker again, or export the model with options={id(vectorizer): {"locale": '
        '"C.UTF-8"}}'
    )
