"""The page on settings: its tables have every setting with its default, values and meaning."""

import re
from typing import Any

from asyncinfer.settings import Knob, knobs
from tests.docs.markdown import page


def test_every_setting_has_its_row_in_the_order_of_the_code() -> None:
    shown = re.findall(r"^\| `[A-Z_]+`.*\|$", page("settings.md").text, re.MULTILINE)
    assert shown == [row_of(knob) for knob in knobs()]


def row_of(knob: Knob) -> str:
    """The row of a setting in its table."""
    name = f"`{knob.variable}`{' *' if knob.advanced else ''}"
    unit = f" ({knob.unit})" if knob.unit else ""
    return f"| {name} | {default_of(knob)} | {knob.allowed}{unit} | {knob.help} |"


def default_of(knob: Knob) -> str:
    """The default in words: bytes and times with their unit."""
    default: Any = knob.default
    match default:
        case None | ():
            return knob.unset
        case bool():
            return str(default).lower()
        case str():
            return f"`{default}`"
    match knob.unit:
        case "bytes":
            return in_bytes(default)
        case "seconds":
            return f"{default / 3600:g} h" if default >= 3600 else f"{default:g} s"
        case _:
            return f"{default:,}" if knob.unit else str(default)


def in_bytes(size: int) -> str:
    """A size in the largest unit of which it is a whole number, from MiB to GiB."""
    shift, unit = (30, "GiB") if size >= 1 << 30 else (20, "MiB")
    return f"{size >> shift} {unit}" if size else "0"
