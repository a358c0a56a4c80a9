"""Colour and progress appear on terminals, and only there."""

import re
from pathlib import Path

import pytest

from tests.cli.command_line import run_command, run_in_shell

from .pseudo_terminal import at_a_terminal
from .submitted_jobs import submit, wait_until_ended

ESCAPE = "\x1b["
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


@pytest.mark.soak
def test_a_terminal_has_colour_and_a_pipe_has_none(url: str, tmp_path: Path) -> None:
    wait_until_ended(url, submit(url))

    assert COLOUR.search(at_a_terminal(["jobs"], 120).text)
    assert ESCAPE not in run_in_shell("asyncinfer jobs", tmp_path).out


def test_no_color_is_honoured(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_ended(url, submit(url))
    monkeypatch.setenv("NO_COLOR", "1")

    assert not COLOUR.search(at_a_terminal(["jobs"], 120).text)


@pytest.mark.soak
def test_progress_is_shown_on_a_terminal_and_never_in_a_pipe(url: str, tmp_path: Path) -> None:
    (tmp_path / "many.csv").write_text("5.1,3.5,1.4,0.2\n" * 3000)
    argv = ["predict", "many.csv", "-o", "answers.csv"]

    shown = at_a_terminal(argv, 100, cwd=tmp_path)
    assert shown.code == 0
    assert "3,000 rows" in shown.text

    ran = run_in_shell(f"asyncinfer {' '.join(argv)}", tmp_path)
    assert (ran.out, ran.err) == ("", "")


def test_an_error_of_a_row_is_shown_above_the_bar_which_fits_a_narrow_terminal(
    url: str, tmp_path: Path
) -> None:
    (tmp_path / "many.csv").write_text("5.1,3.5,1.4,0.2\n" * 300 + "5.1,x,1.4,0.2\n")

    shown = at_a_terminal(["predict", "many.csv", "-o", "answers.csv"], 40, cwd=tmp_path)

    lines = shown.text.replace("\r", "\n").split("\n")
    bars = [line for line in lines if " rows " in line]
    assert shown.code == 1
    assert any(line.startswith("row 301: line 301: column '2': 'x' is no number") for line in lines)
    assert "301 rows" in bars[-1]
    assert "errors=1" in bars[-1]
    assert max(map(len, bars)) <= 40


def test_a_terminal_gets_a_table_of_answers(url: str) -> None:
    shown = at_a_terminal(["predict", "5.1", "3.5", "1.4", "0.2"], 100)

    assert "class_name" in shown.text
    assert "setosa" in shown.text


@pytest.mark.soak
def test_a_reason_to_wait_is_shown_above_the_bar(url: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{','.join('0' * 64)}\n" * 3)
    run_command("pause", "digits")
    try:
        argv = ["predict", "rows.csv", "-m", "digits", "-o", "out.csv", "--timeout", "3"]
        shown = at_a_terminal(argv, 100, cwd=tmp_path)
    finally:
        run_command("cancel", "--model", "digits")
        run_command("resume", "digits")

    assert shown.code == 4
    assert "\rasyncinfer: 3 rows of digits wait: digits is paused" in shown.text


@pytest.mark.parametrize(
    ("key", "columns"),
    [
        ("q", 80),
        ("\x03", 160),
        pytest.param("q", 160, marks=pytest.mark.soak),
        pytest.param("\x03", 80, marks=pytest.mark.soak),
    ],
)
def test_top_is_drawn_as_wide_as_the_terminal_and_left_by_a_key(
    url: str, columns: int, key: str
) -> None:
    shown = at_a_terminal(["top"], columns, typed=key, until="ready")

    assert shown.code == 0
    assert "iris" in shown.text
    assert ("DELAYED" in shown.text) == (columns == 160)
    assert "\x1b[?1049l" in shown.text  # the screen is as it was before
    assert "Traceback" not in shown.text
