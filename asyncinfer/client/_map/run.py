"""A map under way: which rows are sent, whose results are due, and what is said meanwhile."""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from asyncinfer.client._errors import SlowMapWarning, WaitTimeout
from asyncinfer.client._map import jobs
from asyncinfer.client._map.jobs import MapOptions, MapPlan
from asyncinfer.client._map.rows import MapRows, RowBlock
from asyncinfer.client._map.threads import FlowOutcome
from asyncinfer.client._progress import LogProgress, Progress, ProgressBar
from asyncinfer.client._protocol import Flow
from asyncinfer.client._requests import RemoteServer
from asyncinfer.client._wait_reasons import Notices, Silence, WaitingFor
from asyncinfer.errors import AsyncinferError, InputError, RequestError

_BLOCKS_PER_FLIGHT: Final = 2
"""Blocks that may be under way or done out of order, for each request that may be in flight. A
slow block at the front holds up the others only so far, and only so many results wait in memory."""
_FEW_ROWS: Final = 64
"""So few rows are run soon enough, each alone."""
_CLIENT: Final = "asyncinfer.client."
_POINTER_IN_JOB: Final = re.compile(r"/data/\d+((?:/\d+)*)")
_ROW_IN_JOB: Final = re.compile(r"\Arow \d+ (?=has )")


class MapRun:
    """The state of a map, without I/O: threads and event loops do what it says.

    Until it `is_over`, `start` the next block if it `wants_block`, else wait for an outcome and
    `take` it.
    """

    def __init__(
        self, server: RemoteServer, wanted: MapOptions, plan: MapPlan, rows: MapRows
    ) -> None:
        self._server = server
        self.wanted = wanted
        self._plan = plan
        self._rows = rows
        self.max_rows_per_block = plan.max_rows_per_block
        self.bar: Progress = (
            ProgressBar(rows.total, wanted.group) if wanted.progress else LogProgress()
        )
        self._notices = Notices(server.on_wait or self.bar.say, server.cadence)
        self._reason: WaitingFor | None = None
        self._has_more = True
        self._blocks_started = self._blocks_given = 0
        self._rows_started = self._rows_answered = self._rows_given = 0
        self._early: dict[int, list[Any]] = {}
        """Results by block that wait for those of the blocks before them."""
        self._may_warn = not plan.model.batched
        self.close_error: AsyncinferError | None = None
        """Why the group could not be closed, to be raised once all results are given."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Closes the bar at the end of a block, whose error gets a note on how to resume."""
        try:
            yield
        except BaseException as error:
            error.add_note(
                f"Map the same rows with group={self.wanted.group!r} to go on: rows that are done "
                "do not run again."
            )
            raise
        finally:
            self.bar.close()

    @property
    def is_over(self) -> bool:
        """Whether all rows were read, and all their results given."""
        return not self._has_more and self._blocks_started == self._blocks_given

    @property
    def wants_block(self) -> bool:
        """Whether another block may be started."""
        room = _BLOCKS_PER_FLIGHT * self.wanted.in_flight
        return self._has_more and self._blocks_started - self._blocks_given < room

    def start(self, block: RowBlock | None) -> tuple[int, Flow[list[Any]]] | None:
        """The number and the flow of the next block; None says that there are no more."""
        if block is None:
            self._has_more = False
            return None
        self._blocks_started += 1
        self._rows_started += len(block)
        self._warn_if_slow()
        return self._blocks_started - 1, jobs.run_block(self._server, self._plan, block)

    def may_be_last(self, outcome: FlowOutcome) -> bool:
        """Whether a map with a webhook must read its next block before it takes this outcome: its
        group is closed before the last results are given, as nobody may ask for more."""
        return self._has_more and self._answers_all(outcome)

    def closes_group(self, outcome: FlowOutcome) -> bool:
        """Whether the group is to be closed before this outcome is taken."""
        return not self._has_more and not self._rows.failure and self._answers_all(outcome)

    def _answers_all(self, outcome: FlowOutcome) -> bool:
        """Whether a map with a webhook has, with this outcome, results of all blocks so far."""
        answered = self._blocks_given + len(self._early) + 1
        is_complete = outcome.error is None and answered == self._blocks_started
        return is_complete and self.wanted.webhook is not None

    def take(self, outcome: FlowOutcome) -> Iterator[Any]:
        """Takes the outcome of a block, and yields the results whose turn it is now, maybe none.

        Raises an error that ends the map, or that of a row unless errors are returned. It must be
        iterated to its end.
        """
        if isinstance(outcome.error, WaitTimeout):
            raise self._timeout_error(outcome.error.waiting_for) from outcome.error
        self._report(None)
        if outcome.error is not None:
            raise outcome.error
        self._early[outcome.number] = outcome.value
        self._rows_answered += len(outcome.value)
        errors = sum(isinstance(value, AsyncinferError) for value in outcome.value)
        self.bar.advance(len(outcome.value), errors)
        while self._blocks_given in self._early:
            yield from map(self._result_of_next_row, self._early.pop(self._blocks_given))
            self._blocks_given += 1

    def new_silence(self) -> Silence:
        """The time without an answer, from now on."""
        return Silence(self._server.until, self._server.cadence)

    def extend(self, silence: Silence, reason: WaitingFor | None) -> None:
        """Reports why no answer comes, if that is due; raises WaitTimeout if the time is over.

        `reason` None says that nothing is wrong, which is reported if something was.
        """
        if silence.is_over:
            raise self._timeout_error(reason)
        silence.schedule_next()
        self._report(reason)

    def _report(self, reason: WaitingFor | None) -> None:
        self._reason = reason
        name, verb = self._plan.model.model, "waits" if self._rows_out == 1 else "wait"
        self._notices.report(reason, f"{self._rows_text} of {name} {verb}", f"{name} goes on")

    def _timeout_error(self, reason: WaitingFor | None) -> Exception:
        """The error for the rows without an answer; None stands for the reason reported last.

        If no more rows could be read, that error, as it came first.
        """
        if self._rows.failure:
            return self._rows.failure
        reason = reason or self._reason
        why = f": {reason.message}" if reason else "."
        return WaitTimeout(
            f"No result in time for {self._rows_text} of {self._plan.model.model}{why}",
            waiting_for=reason,
        )

    @property
    def _rows_out(self) -> int:
        """The number of rows that were sent and have no answer."""
        return self._rows_started - self._rows_answered

    @property
    def _rows_text(self) -> str:
        """That number with its noun, as `1 row`."""
        return f"{self._rows_out:,} row{'s' * (self._rows_out != 1)}"

    def _result_of_next_row(self, value: Any) -> Any:
        """The result of the next row, or its error with the row's number, which may be raised."""
        row, self._rows_given = self._rows_given, self._rows_given + 1
        if not isinstance(value, AsyncinferError):
            return value
        error = _error_of_row(value, row, has_axis=self._plan.rows_are_inputs)
        if self.wanted.on_error == "raise":
            raise error
        return error

    def _warn_if_slow(self) -> None:
        """Warns once if many rows run one by one: nothing else explains why that takes long."""
        if self._may_warn and self._rows_started > _FEW_ROWS:
            self._may_warn = False
            model = self._plan.model
            warnings.warn(
                f"{model.model} runs each row alone, so many rows take long. Its batching is "
                f"{model.batching or 'off'}",
                SlowMapWarning,
                stacklevel=_callers_level(),
            )


def _error_of_row(error: AsyncinferError, row: int, *, has_axis: bool) -> AsyncinferError:
    """A copy of an error with the row's number, since several rows may share one error.

    Its faults have their places in the row: the number of a row in its job means nothing to a user.
    `has_axis` says that the row is an input by itself, with rows of its own.
    """
    copy = type(error).__new__(type(error))
    copy.__dict__.update(error.__dict__)
    if isinstance(copy, RequestError) and copy.faults:
        copy.faults = copy.faults if has_axis else tuple(map(_fault_in_row, copy.faults))
        copy.detail = "; ".join(map(_fault_text, copy.faults))
    copy.args = (f"Row {row}: {copy.detail}",)
    copy.row = row
    return copy


def _fault_in_row(fault: InputError) -> InputError:
    """A fault with its place in the row, such as /2, empty for the whole row."""
    match = _POINTER_IN_JOB.fullmatch(fault.pointer)
    return InputError(match[1], _ROW_IN_JOB.sub("", fault.detail)) if match else fault


def _fault_text(fault: InputError) -> str:
    """The detail of a fault after its place, as `value at 2: ...`."""
    if not fault.pointer:
        return fault.detail
    is_value = fault.pointer[1:].replace("/", "").isdecimal()
    place = f"value at {fault.pointer[1:]}" if is_value else fault.pointer
    return f"{place}: {fault.detail}"


def _callers_level() -> int:
    """The `stacklevel` of the line outside of this package that takes the results."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_CLIENT):
        level, frame = level + 1, frame.f_back
    return level + 1
