"""Why a version of a model is not served: what is wrong, and the remedy that the reason names."""

import re
from typing import Final

_REMEDY: Final = re.compile(
    "[;:] ((?:Cast|copy|download|export|give|install|keep|leave|let|look|move|pip install|put|"
    "rename|repair|run `git|save|set|Transpose|unpack) .*)",
    re.DOTALL,
)


def without_name(model: str, version: str | None, reason: str) -> str:
    """The reason without the name of the version or model at its start, where that is said."""
    for name in (f"{model}/{version}", model):
        reason = reason.removeprefix(f"{name}: ")
    return reason


def split_reason(model: str, version: str | None, reason: str) -> tuple[str, str]:
    """What is wrong, without the name at its start, and the remedy, "" if the reason has none."""
    reason = without_name(model, version, reason)
    if match := _REMEDY.search(reason):
        return reason[: match.start()], match[1]
    return reason, ""
