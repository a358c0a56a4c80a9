"""The commands `models`, `pause` and `resume`."""

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import click
import msgspec

from asyncinfer.cli import options
from asyncinfer.cli.api_client import connect, seconds_by_rows
from asyncinfer.cli.exit_codes import say_error
from asyncinfer.cli.model_reasons import without_name
from asyncinfer.cli.options import ServerOptions
from asyncinfer.cli.output import console, counted, say, say_json, seconds, show, show_facts, styled
from asyncinfer.untrusted.printable import printable_line

_LOADING: Final = ("loading", "yellow")
_STATE_TEXTS: Final = {
    "no worker": "no worker: jobs are accepted, but none runs until a worker serves the model",
    "paused": "paused: jobs are accepted, but none runs until `asyncinfer resume`",
}

if TYPE_CHECKING:
    from asyncinfer.client import Catalog, Model, ModelProblem, PausedState, TensorInfo


@options.command(
    "models",
    "asyncinfer models",
    "asyncinfer models iris",
    "asyncinfer models --json",
)
@click.argument("model", required=False)
@options.server
@options.as_json
def models(model: str | None, server: ServerOptions, as_json: bool) -> None:
    """List models, or show one with its example.

    The times of a run are measured by the workers.
    """
    with connect(server) as client:
        if as_json:
            path = "/models" if model is None else f"/models/{quote(model, safe='')}"
            say_json(client.request("GET", path))
        elif model is None:
            _show_all(client.catalog())
        else:
            _show_one(client.model(model))


@options.command("pause", "asyncinfer pause digits")
@click.argument("model")
@options.server
@options.as_json
def pause(model: str, server: ServerOptions, as_json: bool) -> None:
    """Pause a model: accept its jobs, but run none of them."""
    with connect(server) as client:
        _report(client.pause(model), "is paused: it accepts jobs and runs none", as_json)


@options.command("resume", "asyncinfer resume digits")
@click.argument("model")
@options.server
@options.as_json
def resume(model: str, server: ServerOptions, as_json: bool) -> None:
    """Resume a paused model."""
    with connect(server) as client:
        _report(client.resume(model), "runs jobs again", as_json)


def _report(state: "PausedState", outcome: str, as_json: bool) -> None:
    """Prints what a pause or resume has done, in words or as JSON."""
    if as_json:
        say_json(state)
    else:
        say(f"{state.model} {outcome}.\n")


def _show_all(listed: "Catalog") -> None:
    """Prints a table of the models on stdout, also of those that load, and problems on stderr."""
    known = {model.model for model in listed.models}
    rows = [_row(model, listed.loading) for model in listed.models]
    rows += [_loading_row(name) for name in listed.loading if name not in known]
    show(
        ("MODEL", "VERSION", "TAKES", "BATCHED", "RUN", "WORKERS", "STATE"),
        rows,
        numeric=("WORKERS",),
    )
    if not rows:
        say_error("No model is served yet. Put an ONNX file into the MODEL_DIR of a worker.")
    _warn(listed.all_problems)


def _warn(problems: Sequence["ModelProblem"]) -> None:
    """Prints each problem of a model on stderr, in one line."""
    for problem in problems:
        where = f"{problem.model} {problem.version or 'all versions'}, worker {problem.worker}"
        reason = without_name(problem.model, problem.version, problem.reason)
        line = styled(printable_line(f"{where}: {reason}"), "yellow")
        console(stderr=True).print(line, soft_wrap=True)


def _row(model: "Model", loading: Sequence[str]) -> Sequence[object]:
    """The cells of a model that is served; `loading` has the names of models that are loading."""
    name = f"{model.model} (default)" if model.default else model.model
    takes = ", ".join(map(_tensor, model.inputs))
    batched = "yes" if model.batched else "no"
    state, style = _state(model, loading)
    shown = styled(state, style)
    return name, model.version, takes, batched, _fastest(model.run_times), model.workers, shown


def _loading_row(name: str) -> Sequence[object]:
    """The cells of a model that a worker is loading and none serves yet."""
    return name, None, None, None, None, 0, styled(*_LOADING)


def _state(model: "Model", loading: Sequence[str] = ()) -> tuple[str, str]:
    """The state in words, such as `paused`, and its style."""
    if not model.workers:
        if model.model in loading:
            return _LOADING
        return "no worker", "bold red"
    return ("paused", "yellow") if model.paused else ("runs", "")


def _fastest(run_times: dict[str, dict[str, float]]) -> str | None:
    """The shortest run of one row, as `1.2 ms for 1`, or of the fewest rows that were measured.

    `run_times` has the seconds by worker and number of rows. None if nothing was measured.
    """
    measured = [pair for times in run_times.values() for pair in seconds_by_rows(times)]
    if not measured:
        return None
    rows, spent = min(measured)
    return f"{seconds(spent)} for {rows}"


def _tensor(spec: "TensorInfo") -> str:
    """A tensor as `data FP32[batch, 4]`."""
    return f"{spec.name} {spec.datatype}{spec.shape_words}"


def _show_one(model: "Model") -> None:
    """Prints all facts of a model on stdout, and its problems on stderr."""
    show_facts(_facts(model))
    _warn(model.problems)


def _facts(model: "Model") -> Iterator[Sequence[object]]:
    """Pairs of a name and a value, in the order in which they are shown."""
    yield "model", f"{model.model} (default)" if model.default else model.model
    if model.description:
        yield "description", model.description
    yield "version", f"{model.version} of {', '.join(model.versions)}"
    yield "takes", ", ".join(map(_tensor, model.inputs))
    yield "returns", ", ".join(map(_tensor, model.outputs))
    if model.labels:
        yield "labels", ", ".join(model.labels)
    why = model.batching.removeprefix("on: ").removeprefix("off: ")
    yield "batched", f"{'yes' if model.batched else 'no'}: {why}"
    yield "rows per job", f"at most {model.max_rows:,}"
    state, _ = _state(model)
    yield "state", _STATE_TEXTS.get(state, state)
    yield "workers", model.workers
    for worker, times in model.run_times.items():
        runs = seconds_by_rows(times)
        shown = [f"{counted(rows, 'row')} {seconds(spent)}" for rows, spent in runs]
        yield f"run on {worker}", ", ".join(shown)
    example = _example_argument(model.shown_example)
    yield "example", f"asyncinfer predict --model {model.model} {example}"


def _example_argument(example: Any) -> str:
    """An example as an argument of `predict`, quoted for a shell; `FILE` if none short is known."""
    if not isinstance(example, dict):
        return "FILE"
    shown = shlex.quote(msgspec.json.encode(example.get("data", example)).decode())
    return shown if len(shown) < 200 else "FILE    # see --json for an input that works"
