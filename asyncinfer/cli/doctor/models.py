"""Checks of the model folder: each model is loaded in a child process, as a worker does."""

from collections.abc import Sequence
from pathlib import Path

import anyio

from asyncinfer.cli.doctor.findings import Finding, ok, problem, warning
from asyncinfer.cli.model_reasons import split_reason
from asyncinfer.cli.output import counted, size
from asyncinfer.errors import ModelDirUnreadable
from asyncinfer.models.folder import ModelFile, read_stamp, served_versions, total_bytes
from asyncinfer.processes.cpus import usable_cores
from asyncinfer.worker.models.sandbox import try_in_child
from asyncinfer.worker.models.source import ModelSource


async def examine_models(source: ModelSource, *, allow_custom_ops: bool) -> list[Finding]:
    """A finding for the folder and one for each version, in the order of the folder's listing.

    It loads and runs each version in a child process, as many at once as there are cores.
    `allow_custom_ops` is the setting of that name. Raises nothing: a folder that cannot be read is
    a problem.
    """
    try:
        listing = source.listing()
    except ModelDirUnreadable as error:
        return [problem("models", error.detail, "set MODEL_DIR to a folder that can be read")]
    files = listing.files
    missing = source.missing_models({file.model for file in files})
    if not files and not missing:
        mend = f"put an ONNX file there: cp my.onnx {source.watched_folder}/"
        return [problem("models", f"{source.watched_folder} has no model", mend)]
    found = [ok("models", f"{counted(len(files), 'version')} in {source.watched_folder}")]
    found += [ok("models", line) for line in listing.ignored]
    if missing:
        here = ", ".join(sorted({file.model for file in files}))
        mend = f"set MODELS to some of {here}" if here else "correct MODELS, or MODEL_DIR"
        found.append(problem("models", f"MODELS names {', '.join(missing)}: not there", mend))
    limiter = anyio.CapacityLimiter(usable_cores())
    verdicts: dict[int, Finding] = {}

    async def examine(index: int, file: ModelFile) -> None:
        async with limiter:
            verdicts[index] = await _examine(file, files, allow_custom_ops=allow_custom_ops)

    async with anyio.create_task_group() as group:
        for index, file in enumerate(files):
            group.start_soon(examine, index, file)
    return found + [verdicts[index] for index in sorted(verdicts)]


async def _examine(
    file: ModelFile, files: Sequence[ModelFile], *, allow_custom_ops: bool
) -> Finding:
    """The finding on one version: ok, a problem, or a warning if another version is served instead.

    `files` are all files of the folder.
    """
    about = f"model {file.model}/{file.version}" if file.version else f"model {file.model}"
    size_bytes = total_bytes(read_stamp(file))
    reason = file.problem or await try_in_child(file, size_bytes, allow_custom_ops=allow_custom_ops)
    if not reason:
        return ok(about, f"loads and runs ({size(size_bytes)})")
    reason, remedy = split_reason(file.model, file.version, reason)
    mend = remedy or f"correct, replace or remove it: {_faulty_path(file, reason)}"
    served = served_versions([other for other in files if other.model == file.model])[file.model]
    if served is not file:
        return warning(about, f"{reason}; another version is served", mend)
    return problem(about, reason, mend)


def _faulty_path(file: ModelFile, reason: str) -> Path:
    """The path of the file to correct: the model.toml if the reason names it, else the model."""
    is_of_toml = file.toml_problem or reason.startswith(f"{file.model}/model.toml: ")
    return file.path.parents[1] / "model.toml" if is_of_toml else file.path
