"""The commands about models: `models`, `pause`, `resume`."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from asyncinfer.cli import options
from asyncinfer.cli.options import Server

_LOADING: Final = ("loading", "yellow")
_MEANING: Final = {
    "no worker": "no worker: jobs are taken in, and none is run until `asyncinfer work` has it",
    "paused": "paused: jobs are taken in, and none is run",
}

if TYPE_CHECKING:
    from asyncinfer.cli.api_client import ModelList
    from asyncinfer.client import Model, TensorInfo


@options.command(
    "models",
    "asyncinfer models",
    "asyncinfer models iris",
    "asyncinfer models --json",
)
@click.argument("model", required=False)
@options.server
@options.as_json
def models(model: str | None, server: Server, as_json: bool) -> None:
    """List models, or show one with its example.

    Times of a run are those that the workers measured.
    """
    from asyncinfer.cli.api_client import ModelList, Service, part
    from asyncinfer.cli.output import say_json

    path = "/models" if model is None else f"/models/{part(model)}"
    with Service(server) as service:
        if as_json:
            say_json(service.ask("GET", path))
        elif model is None:
            _show_all(service.ask_as(ModelList, "GET", path))
        else:
            _show_one(service.client.model(model))


@options.command("pause", "asyncinfer pause digits")
@click.argument("model")
@options.server
@options.as_json
def pause(model: str, server: Server, as_json: bool) -> None:
    """Take a model's jobs in, and run none."""
    _set(model, server, as_json, "pause", "takes jobs in and runs none, until `resume`")


@options.command("resume", "asyncinfer resume digits")
@click.argument("model")
@options.server
@options.as_json
def resume(model: str, server: Server, as_json: bool) -> None:
    """Run a paused model's jobs again."""
    _set(model, server, as_json, "resume", "runs its jobs again")


def _set(model: str, server: Server, as_json: bool, verb: str, told: str) -> None:
    from asyncinfer.cli.api_client import Service, part
    from asyncinfer.cli.output import say, say_json

    with Service(server) as service:
        answer = service.ask("POST", f"/models/{part(model)}/{verb}")
    if as_json:
        say_json(answer)
    else:
        say(f"{model} {told}.\n")


def _show_all(listed: "ModelList") -> None:
    from asyncinfer.cli.api_client import told_problem
    from asyncinfer.cli.exit_codes import complain
    from asyncinfer.cli.output import console, show, styled

    known = {one.model for one in listed.models}
    rows = [_row(one, listed.loading) for one in listed.models]
    rows += [_unknown_row(name) for name in listed.loading if name not in known]
    show(
        ("MODEL", "VERSION", "TAKES", "BATCHED", "RUN", "WORKERS", "STATE"),
        rows,
        numeric=("WORKERS",),
    )
    if not rows:
        complain("No model is served yet. Put an ONNX file into the MODEL_DIR of a worker.")
    for one in listed.all_problems:
        console(stderr=True).print(styled(told_problem(one), "yellow"), soft_wrap=True)


def _row(model: "Model", loading: Sequence[str]) -> Sequence[object]:
    from asyncinfer.cli.output import styled

    name = f"{model.model} (default)" if model.default else model.model
    takes = ", ".join(map(_tensor, model.inputs))
    batched = "yes" if model.batched else "no"
    state, style = _state(model, loading)
    shown = styled(state, style)
    return name, model.version, takes, batched, _fastest(model.run_times), model.workers, shown


def _unknown_row(name: str) -> Sequence[object]:
    from asyncinfer.cli.output import styled

    return name, None, None, None, None, 0, styled(*_LOADING)


def _state(model: "Model", loading: Sequence[str] = ()) -> tuple[str, str]:
    """In a word, and the style that it has."""
    if not model.workers:
        if model.model in loading:
            return _LOADING
        return "no worker", "bold red"
    return ("paused", "yellow") if model.paused else ("runs", "")


def _fastest(run_times: dict[str, dict[str, float]]) -> str | None:
    """Of one row, or of the fewest that ran."""
    from asyncinfer.cli.api_client import by_rows
    from asyncinfer.cli.output import seconds

    found = [one for times in run_times.values() for one in by_rows(times)]
    if not found:
        return None
    rows, took = min(found)
    return f"{seconds(took)} for {rows}"


def _tensor(spec: "TensorInfo") -> str:
    """As `data FP32[batch, 4]`."""
    return f"{spec.name} {spec.datatype}{spec.shape_words}"


def _show_one(model: "Model") -> None:
    from asyncinfer.cli.api_client import told_problem
    from asyncinfer.cli.output import console, show_facts

    show_facts(_facts(model))
    for one in model.problems:
        console(stderr=True).print(told_problem(one), style="yellow", soft_wrap=True)


def _facts(model: "Model") -> Iterator[Sequence[object]]:
    from asyncinfer.cli.api_client import by_rows
    from asyncinfer.cli.output import seconds

    yield "model", f"{model.model} (default)" if model.default else model.model
    if model.description:
        yield "description", model.description
    yield "version", f"{model.version} of {', '.join(model.versions)}"
    yield "takes", ", ".join(map(_tensor, model.inputs))
    yield "gives", ", ".join(map(_tensor, model.outputs))
    if model.labels:
        yield "labels", ", ".join(model.labels)
    yield "batched", f"{'yes' if model.batched else 'no'}: {model.batching}"
    yield "rows a job", f"at most {model.max_rows:,}"
    state, _ = _state(model)
    yield "state", _MEANING.get(state, state)
    yield "workers", model.workers
    for worker, times in model.run_times.items():
        shown = [f"{rows} rows {seconds(took)}" for rows, took in by_rows(times)]
        yield f"run on {worker}", ", ".join(shown)
    yield "example", f"asyncinfer predict --model {model.model} {_example(model.shown_example)}"


def _example(example: Any) -> str:
    import shlex

    import msgspec

    if not isinstance(example, dict):
        return "FILE"
    shown = shlex.quote(msgspec.json.encode(example.get("data", example)).decode())
    return shown if len(shown) < 200 else "FILE    # see --json for an input that works"
