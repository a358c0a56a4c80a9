"""How the models of other workers differ from those of this one's folder, and what to do."""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.repository.announcements import WorkerSays

_MOST_NAMED: Final = 10
_MOST_PROBLEMS: Final = 10


class Differences(Struct, frozen=True):
    """Between this worker and those that were there before it and serve other folders."""

    lacking: dict[str, str] = {}
    """By model that only the others have, the folder it is served from."""
    only_here: tuple[str, ...] = ()


def differences(
    model_dir: str, models: Collection[str], started_ms: int, others: Iterable[WorkerSays]
) -> Differences:
    """None where an older worker serves this same folder: of two folders the newcomer's is the
    wrong one."""
    older = [one for one in others if (one.started_ms or started_ms) < started_ms]
    if any(one.model_dir == model_dir for one in older):
        return Differences()
    elsewhere = [one for one in older if one.model_dir is not None]
    lacking = {
        model: one.model_dir or ""
        for one in elsewhere
        for model in sorted({*one.versions, *one.loading})
        if model not in models
    }
    theirs = {model for one in elsewhere for model in (*one.versions, *one.loading)}
    only_here = tuple(sorted(set(models) - theirs)) if elsewhere else ()
    return Differences(dict(sorted(lacking.items())), only_here)


def lacking(model_dir: str, found: Differences) -> dict[str, str]:
    """By model, in the words of an announced problem; of many models some."""
    return {
        model: (
            f"{model_dir} does not have it; other workers serve it from {folder}. {_remedy(folder)}"
        )
        for model, folder in list(found.lacking.items())[:_MOST_PROBLEMS]
    }


def told(model_dir: str, found: Differences) -> str:
    """One line for the log; empty where a person need do nothing."""
    if not found.lacking:
        return ""
    folder = next(iter(found.lacking.values()))
    line = (
        f"Other workers serve {_named(list(found.lacking))} from {folder}; {model_dir} does not "
        f"have {'it' if len(found.lacking) == 1 else 'them'}. {_remedy(folder)}"
    )
    return f"{line} Only this worker has {_named(found.only_here)}." if found.only_here else line


def _remedy(folder: str) -> str:
    return f"Set MODEL_DIR={folder}, or MODELS to what this worker is meant to serve."


def _named(models: Sequence[str]) -> str:
    more = len(models) - _MOST_NAMED
    return ", ".join(models[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
