"""One version of a model, loaded: opened, described, probed."""

from collections.abc import Sequence
from typing import Final

import msgspec

from asyncinfer.engine import batch_probe, dataflow, examples, signatures
from asyncinfer.engine.batch_probe import Probed, Verdict
from asyncinfer.engine.classes.outputs import decided
from asyncinfer.engine.dataflow import Flow
from asyncinfer.engine.runner import Runner
from asyncinfer.engine.sessions import open_sessions, read_graph
from asyncinfer.errors import ModelFailed, ModelRefused
from asyncinfer.models import batching
from asyncinfer.models.batching import Axes
from asyncinfer.models.batching_obstacles import Off, Reason
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.onnx_graph import File
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Feeds

PROBE_SECONDS: Final = 5.0
"""How long a model may take to show whether its rows can be stacked."""


class Engine:
    """One version of a model, loaded; threads may share it."""

    def __init__(
        self, runner: Runner, signature: Signature, timeout_seconds: float | None = None
    ) -> None:
        self.run = runner.run
        self.signature = signature
        self.plan = batching.plan_of(signature)
        """How its jobs share a run; None where they do not."""
        self.timeout_seconds = timeout_seconds
        """How long one run may take, where `model.toml` says so."""

    @classmethod
    def load(
        cls,
        file: ModelFile,
        *,
        intra_op_threads: int,
        probe_seconds: float = PROBE_SECONDS,
        allow_custom_ops: bool = False,
    ) -> "Engine":
        """Raises ModelRefused with the reason; probes the model where batching is in question."""
        if file.problem:
            raise ModelRefused(file.problem)
        sessions, sha256 = open_sessions(
            file, intra_op_threads=intra_op_threads, allow_custom_ops=allow_custom_ops
        )
        graph = read_graph(file)
        signature = signatures.describe(file, sessions[0], sha256, graph)
        runner = Runner(sessions, [spec.name for spec in signature.outputs])
        example = examples.shown(file, signature)
        if runner.maps:
            runner.keys = _keys(runner, signature, example, file, probe_seconds)
            signature = signatures.with_keys(signature, runner.maps, runner.keys)
        signature = decided(signature, file, runner.run, example, probe_seconds)
        verdict = _verdict(runner, signature, example, file, probe_seconds, graph)
        signature = _judged(signature, verdict)
        signatures.check_rows(signature, file)
        signature = examples.with_example(signature, file, runner.run, probe_seconds)
        return cls(runner, signature, file.config.limits.timeout_seconds)


def _judged(signature: Signature, verdict: Verdict) -> Signature:
    reason = verdict.reason
    if verdict.batched and signature.pad:
        reason += "; other sizes are filled up with zeros: model.toml says so, not probed"
    return msgspec.structs.replace(
        signature,
        outputs=signatures.as_seen(signature.outputs, verdict.outputs, verdict.ranks),
        batched=verdict.batched,
        batching=reason,
        input_axes=verdict.inputs,
        output_axes=verdict.outputs,
    )


# --- classes -----------------------------------------------------------------------------------


def _keys(
    runner: Runner,
    signature: Signature,
    example: Feeds | None,
    file: ModelFile,
    probe_seconds: float,
) -> tuple[int | str, ...]:
    """The classes that the maps of scores are for, learnt from what the model answers."""
    remedy = "give an [example] in model.toml, or export it with zipmap off"
    name = signature.outputs[runner.maps[0]].name
    try:
        answer = batch_probe.some_answer(runner.run_raw, signature.inputs, example, probe_seconds)
    except ModelFailed as error:
        raise ModelRefused(
            f"{file.shown}: the classes of `{name}` could not be learnt: {error.detail}; {remedy}"
        ) from error
    found = {tuple(answer[at][0]) if answer[at] else () for at in runner.maps}
    if len(found) > 1:
        names = " and ".join(f"`{signature.outputs[at].name}`" for at in runner.maps)
        raise ModelRefused(
            f"{file.shown}: {names} have scores of different classes; keep one of them with "
            "`outputs` in model.toml, or export it with zipmap off"
        )
    if not (keys := found.pop()):
        raise ModelRefused(f"{file.shown}: the classes of `{name}` could not be learnt; {remedy}")
    return keys


# --- may jobs share a run ----------------------------------------------------------------------


def _verdict(
    runner: Runner,
    signature: Signature,
    example: Feeds | None,
    file: ModelFile,
    probe_seconds: float,
    graph: File | None,
) -> Verdict:
    asked = file.config.batching
    outputs = signature.outputs
    if asked.enabled is False:
        return batch_probe.off(Reason(Off.ASKED), outputs)
    ways = _ways(asked.axis, signature, file)
    if asked.enabled:
        return _forced(ways, signature, file)
    if not ways:
        obstacle = batching.obstacle(signature.inputs)
        assert obstacle is not None, "an input whose first dimension is open could be stacked"
        return batch_probe.off(obstacle, outputs)
    names = [spec.name for spec in outputs]
    flow = dataflow.of_file(graph, names) if graph else Flow(unread=True)
    if flow.unread:
        return batch_probe.off(Reason(Off.UNREAD), outputs)
    mixers = [flow.mixer(_stacked(way, signature)) for way in ways]
    if all(mixers):
        return batch_probe.off(Reason(Off.DYNAMIC, {"operator": mixers[0]}), outputs)
    apart = [way for way, mixer in zip(ways, mixers, strict=True) if not mixer]
    model = Probed(runner.run, signature.inputs, outputs, example, flow.heights)
    return batch_probe.probe(model, probe_seconds, apart)


def _stacked(way: Axes, signature: Signature) -> frozenset[str]:
    """The inputs that have rows."""
    named = zip(signature.inputs, way, strict=True)
    return frozenset(spec.name for spec, axis in named if axis is not None)


def _ways(axis: int | None, signature: Signature, file: ModelFile) -> Sequence[Axes]:
    if axis is None:
        # What nobody tries out must be what the names say, if they say anything.
        declared = batching.declared(signature.inputs) if file.config.batching.enabled else []
        return declared or batching.candidates(signature.inputs)
    way = batching.forced(axis, signature.inputs)
    if all(at is None for at in way):
        problem = batching.obstacle(signature.inputs, axis)
        assert problem is not None, "no input has that axis open"
        raise ModelRefused(f"{file.model}/model.toml: batching.axis = {axis}, but {problem.what}")
    return [way]


def _forced(ways: Sequence[Axes], signature: Signature, file: ModelFile) -> Verdict:
    shown = f"{file.model}/model.toml: batching.enabled = true, but"
    if not ways and (problem := batching.obstacle(signature.inputs)):
        raise ModelRefused(f"{shown} {problem.what}")
    outputs = batching.declared_axes(signature.inputs, ways[0], signature.outputs)
    for spec, at in zip(signature.outputs, outputs, strict=True):
        if at is None:
            problem = batching.obstacle([spec])
            what = problem.what if problem else f"`{spec.name}` is unclear"
            raise ModelRefused(f"{shown} {what}")
    return Verdict(True, "on: model.toml says so, not probed", ways[0], outputs)
