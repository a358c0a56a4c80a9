"""Differences between this worker's model folder and the folders of other workers."""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.repository.announcements import WorkerAnnouncement

_MAX_NAMED: Final = 10
_MAX_PROBLEMS: Final = 10


class Differences(Struct, frozen=True):
    """Between this worker and older ones that serve other folders; empty if there are none."""

    lacking: dict[str, str] = {}
    """By model that only the others have, the folder that it is served from."""
    only_here: tuple[str, ...] = ()
    """Models that only this worker has."""


def find_differences(
    model_dir: str, models: Collection[str], started_ms: int, others: Iterable[WorkerAnnouncement]
) -> Differences:
    """Compares `models`, those of this worker, with what other workers announce that started before
    it, at `started_ms` of Unix time. A worker that does not announce its start or folder is left
    out.

    Returns no differences if an older worker serves this same folder: of two folders the one of the
    newest worker is likely the wrong one.
    """
    older = [other for other in others if (other.started_ms or started_ms) < started_ms]
    if any(other.model_dir == model_dir for other in older):
        return Differences()
    elsewhere = [other for other in older if other.model_dir is not None]
    lacking = {
        model: other.model_dir or ""
        for other in elsewhere
        for model in sorted({*other.versions, *other.loading})
        if model not in models
    }
    theirs = {model for other in elsewhere for model in (*other.versions, *other.loading)}
    only_here = tuple(sorted(set(models) - theirs)) if elsewhere else ()
    return Differences(dict(sorted(lacking.items())), only_here)


def lacking_problems(model_dir: str, differences: Differences) -> dict[str, str]:
    """By model that is missing here, the problem as it is announced; only the first ten models."""
    return {
        model: (
            f"{model_dir} does not have it; other workers serve it from {folder}. {_remedy(folder)}"
        )
        for model, folder in list(differences.lacking.items())[:_MAX_PROBLEMS]
    }


def startup_warning(model_dir: str, differences: Differences) -> str:
    """A line for the log about models that are missing here; empty if there are none."""
    if not differences.lacking:
        return ""
    lacking, only_here = differences.lacking, differences.only_here
    folder = next(iter(lacking.values()))
    line = (
        f"Other workers serve {_joined(list(lacking))} from {folder}; {model_dir} does not "
        f"have {'it' if len(lacking) == 1 else 'them'}. {_remedy(folder)}"
    )
    return f"{line} Only this worker has {_joined(only_here)}." if only_here else line


def _remedy(folder: str) -> str:
    return f"Set MODEL_DIR={folder}, or MODELS to what this worker is meant to serve."


def _joined(models: Sequence[str]) -> str:
    """The names for a message; of many the first ten, and how many more there are."""
    more = len(models) - _MAX_NAMED
    return ", ".join(models[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
