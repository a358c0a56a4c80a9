"""The wait until a service serves its models, or says why it cannot."""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from msgspec import Struct

from asyncinfer.errors import ModelRefused, StartError
from asyncinfer.testing.process import ProcessOutput, is_banner_end, is_start_error
from asyncinfer.testing.running_service import Running
from asyncinfer.testing.status import StatusClient

_PAUSE_SECONDS: Final = 0.02
_LINES_SHOWN: Final = 20
_MODEL_REFUSED_LINE: Final = re.compile(r" ERROR asyncinfer\.worker\.models\.library: Model (.+)")


class StartPlan(Struct, frozen=True, kw_only=True):
    """How to start a service, and what it must serve."""

    environ: Mapping[str, str]
    arguments: Sequence[str]
    folder: Path
    models: tuple[str, ...]
    api_key: str | None
    seconds: float
    """The time limit of the start."""


class PortTaken(Exception):
    """Another process took the port in the meantime."""


def wait_until_serving(log: ProcessOutput, plan: StartPlan, port: int) -> Running:
    """Returns the service once a worker has announced every model of the plan.

    Raises PortTaken; ModelRefused if a model cannot be served; StartError if the service cannot
    start for another reason, or the time limit of the plan is over. Does not stop the process.
    """
    deadline = time.monotonic() + plan.seconds
    log.wait(lambda line: is_banner_end(line) or is_start_error(line), plan.seconds)
    status_client = StatusClient(port, plan.api_key)
    while True:
        _raise_start_failure(log, port)
        with suppress(OSError):  # the API does not answer yet
            served, reasons = status_client.announced()
            if reasons:
                raise _model_refused_error([f"{name}: {why}" for name, why in reasons.items()])
            if served.issuperset(plan.models):
                return Running(port, plan.models, plan.api_key, log)
        if time.monotonic() > deadline:
            raise StartError(
                f"No worker serves the models after {plan.seconds:g} s. {_last_lines(log)}"
            )
        time.sleep(_PAUSE_SECONDS)


def _raise_start_failure(log: ProcessOutput, port: int) -> None:
    """Raises PortTaken, ModelRefused or StartError if the log shows that the start failed, or no
    start at all; else returns nothing."""
    lines = log.lines
    errors = [line for line in lines if is_start_error(line)]
    if any(f"Cannot listen on 127.0.0.1:{port}:" in line for line in errors):
        raise PortTaken
    refused = [match[1] for line in lines if (match := _MODEL_REFUSED_LINE.search(line))]
    if errors and refused:
        raise _model_refused_error(refused)
    if errors:
        raise StartError(errors[0].removeprefix("asyncinfer: "))
    if log.has_ended or not any(map(is_banner_end, lines)):
        raise StartError(f"The service did not start. {_last_lines(log)}")


def _model_refused_error(reasons: Sequence[str]) -> ModelRefused:
    """The error for refused models; each reason begins with a model's name. Of equal ones, one is
    named."""
    return ModelRefused("Cannot be served: " + "; ".join(dict.fromkeys(reasons)))


def _last_lines(log: ProcessOutput) -> str:
    return "Its last lines:\n" + "\n".join(log.lines[-_LINES_SHOWN:])
