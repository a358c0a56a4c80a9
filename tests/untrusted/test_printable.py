"""Escapes for characters that control a terminal or reorder text."""

import json
import logging
import os
import unicodedata
from collections.abc import Iterator

import pytest

from asyncinfer.cli.serve.log_setup import set_up_logging
from asyncinfer.untrusted.printable import printable, printable_json, printable_line

BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = {"\u061c", "\u200e", "\u200f"}


def every_character() -> Iterator[str]:
    """All of Unicode, without surrogates."""
    return (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)


def is_unsafe(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Cc", "Zl", "Zp")
        or unicodedata.bidirectional(character) in BIDIRECTIONAL
        or character in MARKS
    )


@pytest.mark.soak
def test_only_the_unsafe_characters_of_unicode_are_escaped() -> None:
    unsafe = [character for character in every_character() if is_unsafe(character)]
    safe = "".join(every_character()).translate(dict.fromkeys(map(ord, unsafe)))
    assert printable_line(safe) == printable(safe) == safe
    for character in unsafe:
        assert printable_line(character) != character
        assert (printable(character) == character) == (character in "\n\t")


def test_text_in_any_script_stays_as_it_is() -> None:
    text = "Grüße, 世界, مرحبا, שלום, \U0001f468\u200d\U0001f469, C:\\temp\\x1b"
    assert printable(text) == printable_line(text) == text


def test_escaped_json_has_the_same_value() -> None:
    value = {character: character for character in every_character() if is_unsafe(character)}
    shown = printable_json(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(shown) == value
    assert not any(is_unsafe(character) for character in shown if character not in "\n\t")


def test_a_log_line_cannot_be_forged_and_does_not_control_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    set_up_logging("worker", "info", "text")
    try:
        raise ValueError("\x1b[2J\u202e")
    except ValueError:
        logging.getLogger("here").exception("It is %s.", "\x1b[2J\u202e\n2026 INFO forged")

    first, *rest = capsys.readouterr().err.splitlines()
    logging.captureWarnings(False)
    pid = os.getpid()
    assert first.endswith(rf"ERROR worker {pid} here: It is \x1b[2J\u202e\n2026 INFO forged.")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == r"ValueError: \x1b[2J\u202e"
