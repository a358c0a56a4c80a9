"""The figures of all API processes of one `serve`, added up in their parent."""

import logging

import msgspec

from asyncinfer.monitoring.figures import Figures, decode_figures
from asyncinfer.processes.limited_log import LimitedLog

_log = LimitedLog(logging.getLogger(__name__))


class ProcessFigures:
    """Keeps the last figures of each living process, and the sum of those that ended, so that no
    counter falls when a process is killed. Its methods are called in the event loop."""

    def __init__(self) -> None:
        self._living: dict[int, Figures] = {}
        """By the descriptor from which they are read."""
        self._ended = Figures()

    def receive(self, source: int, frame: bytes) -> None:
        """Replaces the figures of a process; damaged ones are logged, and its last ones stay."""
        try:
            self._living[source] = decode_figures(frame)
        except (msgspec.DecodeError, ValueError) as error:
            _log.unexpected("The figures of an API process could not be read.", error)

    def end(self, source: int) -> None:
        """Keeps what an ended process has counted, and forgets what it held."""
        figures = self._living.pop(source, Figures())
        self._ended.add(Figures(figures.counts, figures.histograms))

    def total(self) -> Figures:
        """The sum over all processes since the start of their parent."""
        total = Figures()
        for figures in (self._ended, *self._living.values()):
            total.add(figures)
        return total
