"""Waiting until a service serves its models, or says why it does not."""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from asyncinfer.errors import ModelRefused, StartError
from asyncinfer.testing.process import Log, is_complaint, is_welcome
from asyncinfer.testing.running_service import Running
from asyncinfer.testing.status import Questions

_PAUSE_SECONDS: Final = 0.02
_LINES_SHOWN: Final = 20
_REFUSED_MODEL: Final = re.compile(r" ERROR asyncinfer\.worker\.library: Model (.+)")


class Plan(Struct, frozen=True, kw_only=True):
    environ: Mapping[str, str]
    words: Sequence[str]
    folder: Path
    models: tuple[str, ...]
    api_key: str | None
    seconds: float
    """How long a start may take."""


class PortTaken(Exception):
    """Somebody else was given the port in the meantime."""


def until_it_serves(log: Log, plan: Plan, port: int) -> Running:
    """Returns when a worker has announced every model; raises StartError, or PortTaken."""
    give_up = time.monotonic() + plan.seconds
    log.wait(lambda line: is_welcome(line) or is_complaint(line), plan.seconds)
    questions = Questions(port, plan.api_key)
    while True:
        _refuse_what_failed(log, port)
        served, reasons = _announced(questions)
        if reasons:
            raise _model_refused([f"{name}: {reason}" for name, reason in reasons.items()])
        if served.issuperset(plan.models):
            return Running(port, plan.models, plan.api_key, log)
        if time.monotonic() > give_up:
            raise StartError(f"No worker serves the models after {plan.seconds:g} s. {_end(log)}")
        time.sleep(_PAUSE_SECONDS)


def _announced(questions: Questions) -> tuple[set[str], dict[str, str]]:
    """Nothing while the API cannot say."""
    try:
        return questions.announced()
    except OSError:
        return set(), {}


def _refuse_what_failed(log: Log, port: int) -> None:
    lines = log.lines
    complaints = [line for line in lines if is_complaint(line)]
    if any(f"Cannot listen on 127.0.0.1:{port}:" in line for line in complaints):
        raise PortTaken
    refused = [found[1] for line in lines if (found := _REFUSED_MODEL.search(line))]
    if complaints and refused:
        raise _model_refused(refused)
    if complaints:
        raise StartError(complaints[0].removeprefix("asyncinfer: "))
    if log.has_ended or not any(map(is_welcome, lines)):
        raise StartError(f"The service did not start. {_end(log)}")


def _model_refused(reasons: Sequence[str]) -> ModelRefused:
    return ModelRefused("Cannot be served: " + "; ".join(dict.fromkeys(reasons)))


def _end(log: Log) -> str:
    return "The end of what it said:\n" + "\n".join(log.lines[-_LINES_SHOWN:])
