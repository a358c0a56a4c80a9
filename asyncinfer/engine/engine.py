"""A loaded version of a model: its sessions, its signature, and whether its jobs share runs."""

import time
from collections.abc import Sequence
from typing import Final

import msgspec

from asyncinfer.engine import batch_probe, dataflow, examples, signatures
from asyncinfer.engine.batch_probe import BatchingVerdict, ProbedModel
from asyncinfer.engine.classes.outputs import with_class_outputs
from asyncinfer.engine.dataflow import Flow
from asyncinfer.engine.runner import Runner
from asyncinfer.engine.sessions import open_sessions, read_graph
from asyncinfer.errors import ModelFailed, ModelRefused
from asyncinfer.models import batching
from asyncinfer.models.batching import Axes
from asyncinfer.models.batching_obstacles import Obstacle, Reason
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.onnx_graph import OnnxFile
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Feeds

PROBE_SECONDS: Final = 5.0
"""How long the probes of a model may take that show whether its jobs can share runs."""


class Engine:
    """A loaded version of a model; threads may share it. It is never changed, and its memory is
    freed with its last reference.

    `run(feeds, stop)` is `Runner.run`: it returns the outputs for these inputs.
    """

    def __init__(
        self,
        runner: Runner,
        signature: Signature,
        timeout_seconds: float | None = None,
        probe_seconds: float = 0.0,
    ) -> None:
        self.run = runner.run
        self.provider = runner.provider
        """The name of ONNX Runtime's execution provider that runs what it can."""
        self.signature = signature
        self.plan = batching.batch_plan(signature)
        """How its jobs share a run; None if they do not."""
        self.timeout_seconds = timeout_seconds
        """How long one run may take; None if `model.toml` does not say."""
        self.probe_seconds = probe_seconds
        """How long it took to learn the signature and to probe the model."""

    @classmethod
    def load(
        cls,
        file: ModelFile,
        *,
        intra_op_threads: int,
        probe_seconds: float = PROBE_SECONDS,
        allow_custom_ops: bool = False,
    ) -> "Engine":
        """Opens the file, learns its signature, and probes the model where it is unknown whether
        its jobs can share runs; each kind of probe takes at most `probe_seconds`.
        `intra_op_threads` is for a model whose `model.toml` sets no number. Blocks, so call it in a
        thread.

        Raises ModelRefused with the reason and what to do.
        """
        if file.problem:
            raise ModelRefused(file.problem)
        sessions, sha256 = open_sessions(
            file, intra_op_threads=intra_op_threads, allow_custom_ops=allow_custom_ops
        )
        opened_at = time.perf_counter()
        onnx = read_graph(file)
        graph = onnx.graph if onnx else None
        signature = signatures.describe(file, sessions[0], sha256, graph)
        runner = Runner(sessions, [spec.name for spec in signature.outputs])
        example = examples.configured_example(file, signature)
        if runner.maps:
            runner.keys = _learn_map_keys(runner, signature, example, file, probe_seconds)
            signature = signatures.with_keys(signature, runner.maps, runner.keys)
        signature = with_class_outputs(signature, file, graph, runner.run, example, probe_seconds)
        verdict = _decide_batching(runner, signature, example, file, probe_seconds, onnx)
        signature = _with_verdict(signature, verdict)
        signatures.check_rows(signature, file)
        signature = examples.with_example(signature, file, runner.run, probe_seconds)
        taken_seconds = time.perf_counter() - opened_at
        return cls(runner, signature, file.config.limits.timeout_seconds, taken_seconds)


def _with_verdict(signature: Signature, verdict: BatchingVerdict) -> Signature:
    """The signature with whether and along which axes jobs share runs, why, and the shapes of
    outputs that the probes saw."""
    reason = verdict.reason
    if verdict.batched and signature.pad:
        reason += "; other sizes are filled up with zeros: model.toml says so, not probed"
    return msgspec.structs.replace(
        signature,
        outputs=signatures.with_observed_shapes(signature.outputs, verdict.outputs, verdict.ranks),
        batched=verdict.batched,
        batching=reason,
        input_axes=verdict.inputs,
        output_axes=verdict.outputs,
    )


# --- classes -----------------------------------------------------------------------------------


def _learn_map_keys(
    runner: Runner,
    signature: Signature,
    example: Feeds | None,
    file: ModelFile,
    probe_seconds: float,
) -> tuple[int | str, ...]:
    """The keys of the maps of scores that the model gives, in the order of the first row's map,
    learnt from one run; raises ModelRefused if there are none, or the maps differ in them."""
    remedy = "give an [example] in model.toml, or export it with zipmap off"
    name = signature.outputs[runner.maps[0]].name
    try:
        outputs = batch_probe.run_any_input(
            runner.run_raw, signature.inputs, example, probe_seconds
        )
    except ModelFailed as error:
        raise ModelRefused(
            f"{file.display_path}: the classes of `{name}` could not be learnt: {error.detail}; "
            f"{remedy}"
        ) from error
    found = {tuple(outputs[at][0]) if outputs[at] else () for at in runner.maps}
    if len(found) > 1:
        names = " and ".join(f"`{signature.outputs[at].name}`" for at in runner.maps)
        raise ModelRefused(
            f"{file.display_path}: {names} have scores of different classes; keep one of them with "
            "`outputs` in model.toml, or export it with zipmap off"
        )
    if not (keys := found.pop()):
        raise ModelRefused(
            f"{file.display_path}: the classes of `{name}` could not be learnt; {remedy}"
        )
    return keys


# --- whether jobs may share a run --------------------------------------------------------------


def _decide_batching(
    runner: Runner,
    signature: Signature,
    example: Feeds | None,
    file: ModelFile,
    probe_seconds: float,
    onnx: OnnxFile | None,
) -> BatchingVerdict:
    """Decides by `model.toml`, else by the shapes of the inputs, the graph, and probes of the
    model, in this order. Raises ModelRefused where `model.toml` asks for what cannot be."""
    config = file.config.batching
    outputs = signature.outputs
    if config.enabled is False:
        return batch_probe.not_batched(Reason(Obstacle.ASKED), outputs)
    candidates = _candidate_axes(config.axis, signature, file)
    if config.enabled:
        return _forced_verdict(candidates, signature, file)
    if not candidates:
        obstacle = batching.find_obstacle(signature.inputs)
        assert obstacle is not None, "an input whose first dimension is open could be stacked"
        return batch_probe.not_batched(obstacle, outputs)
    names = [spec.name for spec in outputs]
    flow = dataflow.read_flow(onnx, names) if onnx else Flow(is_unread=True)
    if flow.is_unread:
        return batch_probe.not_batched(Reason(Obstacle.UNREAD), outputs)
    mixing_operators = [flow.mixer(_stacked_inputs(axes, signature)) for axes in candidates]
    if all(mixing_operators):
        reason = Reason(Obstacle.DYNAMIC, {"operator": mixing_operators[0]})
        return batch_probe.not_batched(reason, outputs)
    unmixed = [axes for axes, mixer in zip(candidates, mixing_operators, strict=True) if not mixer]
    model = ProbedModel(runner.run, signature.inputs, outputs, example, flow.heights)
    return batch_probe.probe_batching(model, probe_seconds, unmixed)


def _stacked_inputs(axes: Axes, signature: Signature) -> frozenset[str]:
    named = zip(signature.inputs, axes, strict=True)
    return frozenset(spec.name for spec, axis in named if axis is not None)


def _candidate_axes(axis: int | None, signature: Signature, file: ModelFile) -> Sequence[Axes]:
    """The ways to stack the inputs that are possible by their shapes, the likeliest first; empty if
    there is none. `axis` is the one that `model.toml` sets. Raises ModelRefused if no input can be
    stacked along that."""
    if axis is None:
        # Without a probe the names of the dimensions decide, if they say anything.
        declared = batching.axes_by_name(signature.inputs) if file.config.batching.enabled else []
        return declared or batching.candidate_axes(signature.inputs)
    axes = batching.forced_axes(axis, signature.inputs)
    if all(at is None for at in axes):
        problem = batching.find_obstacle(signature.inputs, axis)
        assert problem is not None, "no input has that axis open"
        raise ModelRefused(
            f"{file.model}/model.toml: batching.axis = {axis}, but {problem.description}"
        )
    return [axes]


def _forced_verdict(
    candidates: Sequence[Axes], signature: Signature, file: ModelFile
) -> BatchingVerdict:
    """The verdict where `model.toml` turns batching on: the first candidate. Raises ModelRefused if
    the shapes of inputs or outputs do not allow it."""
    prefix = f"{file.model}/model.toml: batching.enabled = true, but"
    if not candidates and (problem := batching.find_obstacle(signature.inputs)):
        raise ModelRefused(f"{prefix} {problem.description}")
    outputs = batching.declared_output_axes(signature.inputs, candidates[0], signature.outputs)
    for spec, at in zip(signature.outputs, outputs, strict=True):
        if at is None:
            problem = batching.find_obstacle([spec])
            what = problem.description if problem else f"`{spec.name}` is unclear"
            raise ModelRefused(f"{prefix} {what}")
    return BatchingVerdict(True, "on: model.toml says so, not probed", candidates[0], outputs)
